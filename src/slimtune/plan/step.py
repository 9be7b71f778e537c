"""A micro-batch of a task, and its loss as training computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimtune.data.batches import classification, token_loss
from slimtune.data.encode import IGNORED
from slimtune.errors import PlanError
from slimtune.plan.build import positions_of
from slimtune.plan.memory import Moment, Parts, Work
from slimtune.plan.setting import Setting

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
        return Step(lambda: batch_for(model, setting), _judged(model, classification(None).loss))
    if "ForTokenClassification" in kind or (is_text and model.config.is_encoder_decoder):
        return Step(lambda: batch_for(model, setting), _judged(model, token_loss))
    return Step(lambda: batch_for(model, setting), lambda batch: _own_loss(model, batch))


def _own_loss(model: Any, batch: Batch) -> Tensor:
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise PlanError(f"a {type(model).__name__} has no loss of its own; pass another task_type")
    return loss


def _judged(model: Any, loss_of: Callable[..., Tensor] | None) -> Callable[[Batch], Tensor]:
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
    check_length(config, tokens)
    ids = torch.ones(rows, tokens, dtype=torch.long)
    mask = torch.ones_like(ids)
    if setting.padded and rows > 1:
        mask[0, -1] = 0
    batch: Batch = {"input_ids": ids, "attention_mask": mask}
    if "ForQuestionAnswering" in kind:
        return batch | {name: torch.zeros(rows, dtype=torch.long) for name in ("start_positions", "end_positions")}
    if "ForSequenceClassification" in kind:
        config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
        return batch | {"labels": torch.zeros(rows, dtype=torch.long)}
    if config.is_encoder_decoder:
        return batch | _for_decoder(model, setting)
    labels = ids.masked_fill(mask == 0, IGNORED)
    return batch | {"labels": labels.clamp_max(0) if "ForTokenClassification" in kind else labels}


def _for_decoder(model: Any, setting: Setting) -> Batch:
    """What a decoder reads and is to write, as transformers' collator for it makes them."""
    written = setting.answer or setting.sequence
    if getattr(model.config, "decoder_start_token_id", None) is None:
        raise PlanError("the configuration has no decoder_start_token_id, with which a decoder begins; add it")
    check_length(model.config, written)
    labels = torch.ones(setting.batch, written, dtype=torch.long)
    if setting.padded and setting.batch > 1:
        labels[0, -1] = IGNORED
    return {"labels": labels, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels)}


def check_length(config: Any, tokens: int) -> None:
    """Raises: PlanError, for more tokens than the model has positions."""
    longest = positions_of(config)
    if longest is not None and tokens > longest:
        raise PlanError(f"sequence is {tokens} and the model has {longest} positions; plan with a shorter one")


NOTE = "drawing the answers is an estimate: the prompts are simulated, the growing cache is reckoned"


def read_prompts(model: Any, rows: int, tokens: int) -> Any:
    """The cache after the prompts; call it without gradients."""
    ids = torch.ones(rows, tokens, dtype=torch.long)
    options = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **options).past_key_values


def layers_of(cache: Any) -> list[list[torch.Tensor]]:
    """The keys and values of each layer."""
    return [[t for t in (layer.keys, layer.values) if t is not None] for layer in cache.layers]


def last_token(lasting: Parts, cache: Any, prompt: int, answer: int, head: torch.Tensor) -> Moment:
    """The moment before the end: what lasts, the whole cache, and the logits of one token with what is drawn from."""
    layers = [sum(tensor.nbytes for tensor in layer) for layer in layers_of(cache)]
    rows = layers_of(cache)[0][0].shape[0]

    def grown(nbytes: int) -> int:
        return nbytes * (prompt + answer) // prompt

    # Keys and values are longer by turns; logits in float32, sorted and as probabilities.
    workspace = grown(max(layers)) // 2 + 3 * 4 * rows * head.shape[0]
    parts = Parts(**lasting.named() | {"activations": grown(sum(layers)), "workspace": workspace})
    return Moment("generation", "cache", "cat", parts)


def work_of(prompts: Work, lasting: Parts, cache: Any, prompt: int, answer: int, head: torch.Tensor) -> Work:
    """Of all tokens: each computes as one of the prompt does, and reads all weights and the cache so far."""
    layers = layers_of(cache)
    held = sum(tensor.nbytes for layer in layers for tensor in layer)
    flops = prompts.flops * (prompt + answer) // prompt + 2 * layers[0][0].shape[0] * answer * head.numel()
    mean = held * (2 * prompt + answer) // (2 * prompt)
    return Work(flops, prompts.bytes_moved + answer * (lasting.weights + lasting.adapter + mean))
