"""A training step: the micro-batch of a task, its loss as training computes it, the optimizer, and answers drawn.

- `supervised_step`: batches with labels, and the loss of `slimtune train` on them.
- `optimizer_for`: the optimizer by its name, with its state.
- `prefill`, `last_token`, `generation_work`: grpo's answers, of which the prompts are simulated and the rest estimated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from slimtune.data.batches import IGNORED, classification, token_loss
from slimtune.errors import PlanError
from slimtune.plan.build import check_length
from slimtune.plan.memory import MemoryBreakdown, Setting, Snapshot, Work, padded
from slimtune.recipe.optimizers import BITSANDBYTES, OFFLOADED, PAGED, TORCHAO, check_installed
from slimtune.train.optimizer import OffloadedAdamW

Batch = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """What a training step is made of: its micro-batch, all of it as long as the setting says, and the loss of one."""

    batch: Callable[[], Batch]
    loss: Callable[[Batch], Tensor]


def supervised_step(model: Any, setting: Setting) -> Step:
    """The step of a model that learns from labels. Raises: PlanError."""
    kind, is_text = type(model).__name__, model.main_input_name == "input_ids"
    if is_text and "ForSequenceClassification" in kind:
        # Its tokenizer only pads, and this batch has its length already.
        return Step(lambda: batch_for(model, setting), _loss_of_outputs(model, classification(None).loss))
    if "ForTokenClassification" in kind or (is_text and model.config.is_encoder_decoder):
        return Step(lambda: batch_for(model, setting), _loss_of_outputs(model, token_loss))
    return Step(lambda: batch_for(model, setting), lambda batch: _own_loss(model, batch))


def _own_loss(model: Any, batch: Batch) -> Tensor:
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise PlanError(f"a {type(model).__name__} has no loss of its own; pass another task_type")
    return loss


def _loss_of_outputs(model: Any, loss_of: Callable[..., Tensor] | None) -> Callable[[Batch], Tensor]:
    """The loss of outputs against labels that the model doesn't see, the mean over what is labelled."""
    assert loss_of is not None

    def loss(batch: Batch) -> Tensor:
        labels = batch["labels"]
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
        return loss_of(outputs, labels, num_items_in_batch=(labels != IGNORED).sum())

    return loss


def batch_for(model: Any, setting: Setting) -> Batch:
    """A micro-batch of whole length, all of it supervised but for one padded token. Raises: PlanError."""
    config, main, kind = model.config, model.main_input_name, type(model).__name__
    rows, tokens = setting.batch, setting.sequence
    if main == "pixel_values":
        side = config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        pixels = torch.zeros(rows, config.num_channels, height, width, dtype=model.dtype)
        return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.long)}
    if main != "input_ids":
        raise PlanError(f"a {kind} reads {main}, of which no batch can be planned; it takes texts or images")
    if setting.shared is not None:
        ids, mask = padded(setting.shared.rows)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}
    # (B, T) ids, mask and labels: a real batch, for code that looks at ids and masks takes its usual way.
    check_length(config, tokens)
    ids = torch.ones(rows, tokens, dtype=torch.long)
    mask = torch.ones_like(ids)
    if setting.padded and rows > 1:
        # One padded token is enough for attention to need a mask, which selects another kernel with other memory.
        mask[0, -1] = 0
    batch: Batch = {"input_ids": ids, "attention_mask": mask}
    if "ForQuestionAnswering" in kind:
        return batch | {name: torch.zeros(rows, dtype=torch.long) for name in ("start_positions", "end_positions")}
    if "ForSequenceClassification" in kind:
        config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
        return batch | {"labels": torch.zeros(rows, dtype=torch.long)}
    if config.is_encoder_decoder:
        return batch | _decoder_batch(model, setting)
    labels = ids.masked_fill(mask == 0, IGNORED)
    return batch | {"labels": labels.clamp_max(0) if "ForTokenClassification" in kind else labels}


def _decoder_batch(model: Any, setting: Setting) -> Batch:
    """What a decoder reads and is to write, as transformers' collator for it makes them."""
    written = setting.answer or setting.sequence
    if getattr(model.config, "decoder_start_token_id", None) is None:
        raise PlanError("the configuration has no decoder_start_token_id, with which a decoder begins; add it")
    check_length(model.config, written)
    labels = torch.ones(setting.batch, written, dtype=torch.long)
    if setting.padded and setting.batch > 1:
        labels[0, -1] = IGNORED
    return {"labels": labels, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels)}


LEARNING_RATE = 1e-4
"""Any will do: memory doesn't depend on it."""
# bitsandbytes.optim.optimizer.Optimizer8bit.get_state_buffer has the same bound.
_PAGED_FROM = 100_000
"""bitsandbytes pages the state of parameters of at least so many numbers."""
_TORCH: dict[str, Any] = {
    "adamw_torch": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}


def optimizer_for(setting: Setting, parameters: list[nn.Parameter]) -> Any:
    """The optimizer that training takes under this name."""
    name = setting.optimizer
    check_installed(name)
    if name in (*BITSANDBYTES, *PAGED):
        return _bitsandbytes(name, parameters)
    if name in TORCHAO:
        return _torchao(name, parameters)
    if name == OFFLOADED:
        return OffloadedAdamW(parameters, lr=LEARNING_RATE)
    if name == "adafactor":
        return transformers.Adafactor(parameters, lr=LEARNING_RATE, scale_parameter=False, relative_step=False)
    if name in _TORCH:
        # On a GPU torch updates all tensors at once, which takes more of its memory.
        return _TORCH[name](parameters, lr=LEARNING_RATE, foreach=setting.device == "cuda")
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def is_elsewhere(setting: Setting, parameter: Tensor, state: Tensor) -> bool:
    """Whether a tensor of the optimizer's state lies in main memory, not on the device."""
    if setting.optimizer == OFFLOADED:
        return True
    is_paged = setting.optimizer in PAGED and parameter.numel() >= _PAGED_FROM
    return is_paged and state.untyped_storage().nbytes() >= parameter.numel()


def _bitsandbytes(name: str, parameters: list[nn.Parameter]) -> Any:
    import bitsandbytes

    optim: Any = bitsandbytes.optim
    kinds: dict[str, Any] = {"ademamix": optim.AdEMAMix, "lion": optim.Lion, "rmsprop": optim.RMSprop}
    kind = next((made for part, made in kinds.items() if part in name), optim.AdamW)
    # Not as paged: fake tensors have no pages. `is_elsewhere` says what would be paged.
    optimizer: Any = kind(parameters, lr=LEARNING_RATE, optim_bits=8 if "8bit" in name else 32)
    optimizer.fill_qmap()
    return optimizer


def _torchao(name: str, parameters: list[nn.Parameter]) -> Any:
    from torchao import optim

    kind = optim.AdamW8bit if name.endswith("8bit") else optim.AdamW4bit
    buffer: Callable[..., Tensor] = kind([nn.Parameter(torch.zeros(1))])._new_buffer
    return _StateOnly(parameters, buffer)


class _StateOnly(torch.optim.Optimizer):
    """The state of torchao's AdamW without its step, which is compiled into one kernel and allocates nothing."""

    def __init__(self, parameters: list[nn.Parameter], buffer: Callable[..., Tensor]) -> None:
        super().__init__(parameters, {})
        self.buffer = buffer

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the state of what has none yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    signed, unsigned = (self.buffer(parameter, is_signed) for is_signed in (True, False))
                    self.state[parameter] = {"step": torch.zeros(()), "exp_avg": signed, "exp_avg_sq": unsigned}


GENERATION_NOTE = "drawing the answers is an estimate: the prompts are simulated, the growing cache is reckoned"


def prefill(model: Any, rows: int, tokens: int) -> Any:
    """The cache after the prompts; call it without gradients."""
    ids = torch.ones(rows, tokens, dtype=torch.long)
    options = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **options).past_key_values


def layers_of(cache: Any) -> list[list[torch.Tensor]]:
    """The keys and values of each layer."""
    return [[t for t in (layer.keys, layer.values) if t is not None] for layer in cache.layers]


def last_token(persistent: MemoryBreakdown, cache: Any, prompt: int, answer: int, head: torch.Tensor) -> Snapshot:
    """The peak at the last token: what lasts, the whole cache, and the logits of one token with what is drawn from."""
    layers = [sum(tensor.nbytes for tensor in layer) for layer in layers_of(cache)]
    rows = layers_of(cache)[0][0].shape[0]

    # Keys and values (B, heads, T, width) are linear in T: bytes of the prompts times (prompt + answer) / prompt.
    def grown(nbytes: int) -> int:
        return nbytes * (prompt + answer) // prompt

    # Keys and values are longer by turns; logits in float32, sorted and as probabilities.
    workspace = grown(max(layers)) // 2 + 3 * 4 * rows * head.shape[0]
    parts = MemoryBreakdown(**persistent.named() | {"activations": grown(sum(layers)), "workspace": workspace})
    return Snapshot("generation", "cache", "cat", parts)


def generation_work(
    prompts: Work, persistent: MemoryBreakdown, cache: Any, prompt: int, answer: int, head: torch.Tensor
) -> Work:
    """Work of prompts and answers: a token computes as one of the prompt does, and reads all weights and the cache."""
    layers = layers_of(cache)
    held = sum(tensor.nbytes for layer in layers for tensor in layer)
    # The head: 2 B V D for each drawn token, where the prompts need logits of their last token alone.
    flops = prompts.flops * (prompt + answer) // prompt + 2 * layers[0][0].shape[0] * answer * head.numel()
    # The cache grows from `prompt` to `prompt + answer` tokens: on average it has prompt + answer / 2.
    mean = held * (2 * prompt + answer) // (2 * prompt)
    return Work(flops, prompts.bytes_moved + answer * (persistent.weights + persistent.adapter + mean))
