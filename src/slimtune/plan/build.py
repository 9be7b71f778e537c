"""The model from its configuration alone, and the kernels of the device that is meant.

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
from torch import Tensor

from slimtune.adapters import trl_forward
from slimtune.errors import ConfigError, PlanError, first_line, require
from slimtune.models.auto import BY_TASK, own_auto_class
from slimtune.models.load import read_model_config
from slimtune.models.short_attention import short_attention
from slimtune.ops import cross_entropy
from slimtune.plan.memory import Setting
from slimtune.plan.text_part import text_part, whole_of
from slimtune.storage.foreign import refuse_code
from slimtune.storage.source import PACKAGED, folder_of, is_adapter

FALLBACKS = (
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
    ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING"),
)
"""What a model is taken for where neither a task nor its configuration says."""


def config_of(source: Any, trust_remote_code: bool = False) -> Any:
    """The configuration of a model by folder, Hub id or packaged name; one that is given is copied.

    Of a model that reads pictures or sounds beside texts it is that of the part for texts.

    Raises:
        ModelNotFoundError: there is none, it can't be reached or read, or it needs code from the model's folder.
        ConfigError: it is an adapter.
    """
    if isinstance(source, transformers.PreTrainedConfig):
        return text_part(copy.deepcopy(source))
    source = os.fspath(source)
    if is_adapter(source):
        raise ConfigError(f"{source} is an adapter; plan with its base")
    has_config = (Path(source) / "config.json").is_file()
    is_folder = has_config and source not in PACKAGED
    folder = source if is_folder else folder_of(source, weights=False, code=trust_remote_code)
    return text_part(read_model_config(folder, trust_remote_code))


def model_class(config: Any, task_type: str | None, trust_remote_code: bool = False) -> Any:
    """The transformers class for a task, or the one that the configuration names. Raises: PlanError."""
    whole = whole_of(config)
    if whole is not None and task_type in (None, "CAUSAL_LM"):
        return whole.text_class
    if task_type is not None:
        return getattr(transformers, BY_TASK[str(task_type)])
    own = own_auto_class(config) if trust_remote_code else None
    if own is not None:
        return own
    named = next((getattr(transformers, name, None) for name in config.architectures or []), None)
    if named is not None and not named.__name__.endswith("Model"):
        return named
    for name, mapping in FALLBACKS:
        if type(config) in getattr(transformers, mapping):
            return getattr(transformers, name)
    raise PlanError(f"a {type(config).__name__} doesn't say what its model is tuned for; pass task_type")


def task_of(config: Any, trust_remote_code: bool = False) -> str:
    """What a model is for where no data says it; a model that fills gaps is tuned as a classifier of texts."""
    made = model_class(config, None, trust_remote_code).__name__
    if "ImageClassification" in made:
        return "images"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    kinds = {"ForTokenClassification": "token-classification", "ForSequenceClassification": "classification",
             "ForMaskedLM": "classification"}  # fmt: skip
    return next((task for kind, task in kinds.items() if kind in made), "text")


def positions_of(config: Any) -> int | None:
    """How many tokens a model of this configuration has positions for, None if it tells no number."""
    return getattr(config, "max_position_embeddings", None)


def check_length(config: Any, tokens: int) -> None:
    """Raises: PlanError, for more tokens than the model has positions."""
    longest = positions_of(config)
    if longest is not None and tokens > longest:
        raise PlanError(f"sequence is {tokens} and the model has {longest} positions; plan with a shorter one")


def build(config: Any, setting: Setting, task_type: str | None) -> Any:
    """The model in training mode, its weights as the setting stores them. Raises: PlanError."""
    made = model_class(config, task_type, setting.trust_remote_code)
    options: dict[str, Any] = {"attn_implementation": setting.attention} if setting.attention else {}
    try:
        if hasattr(made, "_from_config"):
            model: Any = made._from_config(config, dtype=getattr(torch, setting.dtype), **options)
        else:
            # Said in any case: where it is left open, transformers asks at the terminal.
            trusts = {"trust_remote_code": setting.trust_remote_code}
            model = made.from_config(config, dtype=getattr(torch, setting.dtype), **trusts, **options)
        # A model whose weights aren't drawn has its ties left undone.
        model.tie_weights()
        if setting.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except (ValueError, ImportError) as error:
        refuse_code(getattr(config, "name_or_path", "") or type(config).__name__, error)
        raise PlanError(f"the model can't be built so: {first_line(error)}") from error
    return model.train()


@contextlib.contextmanager
def kernels_of(setting: Setting, is_fake: bool) -> Iterator[None]:
    """Attention and loss as on this kind of device, while tensors stand on the CPU."""
    if setting.device == "cpu" or not is_fake:
        with short_attention():
            yield
        return
    # Fake tensors say they are on the CPU: what is dispatched by device has to be told which device is meant.
    held, attention = cross_entropy.HELD["cpu"], F.scaled_dot_product_attention
    cross_entropy.HELD["cpu"] = cross_entropy.HELD[setting.device]
    # Not a mode of torch's: inside of a backward pass, which computes checkpoints again, none would be entered.
    F.scaled_dot_product_attention = _cuda_attention
    try:
        with _cuda_head() if setting.task else contextlib.nullcontext():
            yield
    finally:
        cross_entropy.HELD["cpu"], F.scaled_dot_product_attention = held, attention


@contextlib.contextmanager
def _cuda_head() -> Iterator[None]:
    """TRL's loss at the head by its Triton kernels, which work on a tile in place and add up in float32."""

    head = head_module()
    assign = {name: getattr(head, name) for name in ("_forward_tile", "_backward_tile", "_addmm_fp32")}

    def added(sums: Tensor, left: Tensor, right: Tensor) -> None:
        number = sums.new_zeros(())
        sums.addmm_(number.expand(left.shape), number.expand(right.shape))

    head._forward_tile = head._backward_tile = lambda *_, **__: None
    head._addmm_fp32 = added
    trl_forward.BY_TRITON.add("cpu")
    try:
        yield
    finally:
        vars(head).update(assign)
        trl_forward.BY_TRITON.remove("cpu")


def _cuda_attention(*args: Any, **kwargs: Any) -> Tensor:
    """`scaled_dot_product_attention` by the kernels that torch picks on CUDA: flash, or the efficient one."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    arguments = dict(zip(names, args, strict=False)) | kwargs
    if arguments["query"].dtype == torch.float32 and arguments.get("attn_mask") is None:
        return _efficient(**arguments)
    return _flash(**arguments) if arguments.get("attn_mask") is None else _efficient(**arguments)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    # (B, heads, T, width): the efficient kernel has no groups of heads, and torch copies the keys for it.
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            zero, least = (torch.full((), number, dtype=query.dtype) for number in (0.0, float("-inf")))
            attn_mask = torch.where(attn_mask, zero, least)
        # (B, heads, Tq, Tk), expanded and not copied.
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


def head_module() -> Any:
    """Where TRL computes the log-probabilities at the head. Raises: MissingDependencyError."""
    require("trl", extra="trl,train", purpose="a plan of preference tuning")
    from trl.kernels import chunked_logprob

    return chunked_logprob
