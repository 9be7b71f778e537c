"""What a simulated step runs: the model from its configuration alone, made quantized, with a batch and an optimizer.

The same functions build real ones, so that a simulation can be held against a run.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from slimtune.auto import BY_TASK
from slimtune.errors import ConfigError, ModelNotFoundError
from slimtune.loading import PACKAGED, folder_of, is_adapter
from slimtune.ops import cross_entropy
from slimtune.plan.setting import Setting

LEARNING_RATE = 1e-4
"""Any will do: memory doesn't depend on it."""

FALLBACKS = (
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
    ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING"),
)
"""What a model is taken for where neither a task nor its configuration says."""


def config_of(source: Any, trust_remote_code: bool = False) -> Any:
    """The configuration of a model by folder, Hub id or packaged name; one that is given is copied.

    Raises:
        ModelNotFoundError: there is none, it can't be reached or read, or it needs code from the model's folder.
    """
    if isinstance(source, transformers.PreTrainedConfig):
        return copy.deepcopy(source)
    source = os.fspath(source)
    if is_adapter(source):
        raise ConfigError(f"{source} is an adapter; plan with its base")
    has_config = (Path(source) / "config.json").is_file()
    folder = source if has_config and source not in PACKAGED else folder_of(source, weights=False)
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise ModelNotFoundError(
            f"the configuration of '{source}' can't be read: {first}; pass a folder with config.json, or a Hub id that "
            "can be reached"
        ) from error


def model_class(config: Any, task_type: str | None) -> Any:
    """The transformers class for a task, or the one that the configuration names. Raises: ConfigError."""
    if task_type is not None:
        return getattr(transformers, BY_TASK[str(task_type)])
    named = next((getattr(transformers, name, None) for name in config.architectures or []), None)
    if named is not None and not named.__name__.endswith("Model"):
        return named
    for name, mapping in FALLBACKS:
        if type(config) in getattr(transformers, mapping):
            return getattr(transformers, name)
    raise ConfigError(f"a {type(config).__name__} doesn't say what its model is tuned for; pass task_type")


def build(config: Any, setting: Setting, task_type: str | None) -> Any:
    """The model in training mode, its weights as the setting stores them. Raises: ConfigError."""
    made = model_class(config, task_type)
    options: dict[str, Any] = {"attn_implementation": setting.attention} if setting.attention else {}
    try:
        if hasattr(made, "_from_config"):
            model: Any = made._from_config(config, dtype=getattr(torch, setting.dtype), **options)
        else:
            model = made.from_config(config, dtype=getattr(torch, setting.dtype), **options)
        # Without initialisation, weights aren't tied either.
        model.tie_weights()
        # A model whose weights aren't drawn has its ties left undone.
        model.tie_weights()
        if setting.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except (ValueError, ImportError) as error:
        raise ConfigError(f"the model can't be built so: {str(error).splitlines()[0]}") from error
    return model.train()


def batch_for(model: Any, setting: Setting) -> dict[str, Tensor]:
    """A micro-batch of whole length, all of it supervised but for one padded token. Raises: ConfigError."""
    config, main, kind = model.config, model.main_input_name, type(model).__name__
    rows, tokens = setting.batch, setting.sequence
    if main == "pixel_values":
        side = config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        pixels = torch.zeros(rows, config.num_channels, height, width, dtype=model.dtype)
        return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.long)}
    if main != "input_ids":
        raise ConfigError(f"a {kind} reads {main}, of which no batch can be planned; it takes texts or images")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise ConfigError(f"sequence is {tokens} and the model has {longest} positions; plan with a shorter one")
    ids = torch.ones(rows, tokens, dtype=torch.long)
    mask, labels = torch.ones_like(ids), ids.clone()
    if setting.padded and rows > 1:
        mask[0, -1], labels[0, -1] = 0, -100
    batch = {"input_ids": ids, "attention_mask": mask}
    if "ForQuestionAnswering" in kind:
        return batch | {name: torch.zeros(rows, dtype=torch.long) for name in ("start_positions", "end_positions")}
    if "ForSequenceClassification" in kind:
        config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
        return batch | {"labels": torch.zeros(rows, dtype=torch.long)}
    if "ForTokenClassification" in kind:
        labels = labels.clamp_max(0)
    return batch | {"labels": labels}


def optimizer_for(setting: Setting, parameters: list[nn.Parameter]) -> Any:
    """The optimizer that transformers' Trainer takes under this name."""
    name = setting.optimizer
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=LEARNING_RATE)
    if name == "adafactor":
        return transformers.Adafactor(parameters, lr=LEARNING_RATE, scale_parameter=False, relative_step=False)
    from bitsandbytes.optim.adamw import AdamW

    bits = 8 if name.endswith("8bit") else 32
    # Not as paged: fake tensors have no pages. What would be paged is told apart afterwards.
    optimizer = AdamW(parameters, lr=LEARNING_RATE, optim_bits=bits)
    optimizer.fill_qmap()
    return optimizer


PAGED_FROM = 100_000
"""bitsandbytes pages the state of parameters of at least so many numbers."""


@contextlib.contextmanager
def kernels_of(device: str, is_fake: bool) -> Iterator[None]:
    """Attention and loss as on this kind of device, while tensors stand on the CPU."""
    if device == "cpu" or not is_fake:
        yield
        return
    held, attention = cross_entropy.HELD["cpu"], F.scaled_dot_product_attention
    cross_entropy.HELD["cpu"] = cross_entropy.HELD[device]
    # Not a mode of torch's: inside of a backward pass, which computes checkpoints again, none would be entered.
    F.scaled_dot_product_attention = _cuda_attention
    try:
        yield
    finally:
        cross_entropy.HELD["cpu"], F.scaled_dot_product_attention = held, attention


def _cuda_attention(*args: Any, **kwargs: Any) -> Tensor:
    """`scaled_dot_product_attention` by the kernels that torch picks on CUDA: flash, or the efficient one."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    if given["query"].dtype == torch.float32 and given.get("attn_mask") is None:
        return _efficient(**given)
    return _flash(**given) if given.get("attn_mask") is None else _efficient(**given)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            zero, least = (torch.full((), number, dtype=query.dtype) for number in (0.0, float("-inf")))
            attn_mask = torch.where(attn_mask, zero, least)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]
