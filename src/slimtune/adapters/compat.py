"""The functions and classes of `peft`'s namespace that scripts import beside `get_peft_model` and `PeftModel`.

Each does with this library's models what `peft`'s does with its own. What no name here stands for, and why, is on the
page docs/peft.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from slimtune.adapters.adapter import attached, base_tensors
from slimtune.adapters.model import PeftModel, get_peft_model
from slimtune.adapters.read_options import ReadOptions
from slimtune.adapters.stored_keys import on_model
from slimtune.core.config import PeftConfig, TaskType, methods
from slimtune.core.delta import Delta
from slimtune.core.frozen import deltas_of
from slimtune.errors import BaseMismatchError, ConfigError, listing, warn
from slimtune.methods.lora.layers import LoraDelta
from slimtune.methods.trainable_tokens import TokenRows
from slimtune.storage.peft_format import adapter_folder, key, read_adapter

# -- Model classes by task.


class _Kin(type):
    """Makes `PeftModelForCausalLM(model, config)` attach an adapter, and `isinstance` ask for the adapter's task."""

    task: TaskType | None

    def __call__(cls, model: Any, peft_config: PeftConfig, adapter_name: str = "default", **options: Any) -> Any:
        if cls.task is not None and peft_config.task_type is None:
            peft_config.task_type = cls.task
        return get_peft_model(model, peft_config, adapter_name, **options)

    def __instancecheck__(cls, instance: Any) -> bool:
        configs = instance.peft_config.values() if isinstance(instance, PeftModel) else ()
        return any(cls.task is None or config.task_type == cls.task for config in configs)


class PeftMixedModel(metaclass=_Kin):
    """A model with adapters of several methods, as every model with adapters is here."""

    task: ClassVar[TaskType | None] = None
    from_pretrained = PeftModel.from_pretrained


class PeftModelForCausalLM(PeftMixedModel):
    """A model with an adapter for writing text."""

    task = TaskType.CAUSAL_LM


class PeftModelForSeq2SeqLM(PeftMixedModel):
    """A model with an adapter for writing text behind an encoder."""

    task = TaskType.SEQ_2_SEQ_LM


class PeftModelForSequenceClassification(PeftMixedModel):
    """A model with an adapter for classifying texts."""

    task = TaskType.SEQ_CLS


class PeftModelForTokenClassification(PeftMixedModel):
    """A model with an adapter for classifying tokens."""

    task = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(PeftMixedModel):
    """A model with an adapter for finding answers in a passage."""

    task = TaskType.QUESTION_ANS


class PeftModelForFeatureExtraction(PeftMixedModel):
    """A model with an adapter for last hidden states."""

    task = TaskType.FEATURE_EXTRACTION


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, Any] = {
    str(kin.task): kin
    for kin in (
        PeftModelForCausalLM,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        PeftModelForQuestionAnswering,
        PeftModelForFeatureExtraction,
    )
}


# -- Layers by what their adapters are.


class _LayerKind(type):
    """Has `isinstance` ask for what a module's adapters are; nothing is ever made of such a class."""

    def __instancecheck__(cls, instance: Any) -> bool:
        deltas = deltas_of(instance).values() if isinstance(instance, nn.Module) else ()
        return any(cls.fits(delta) for delta in deltas)  # pyright: ignore[reportAttributeAccessIssue]


class BaseTunerLayer(metaclass=_LayerKind):
    """A module with an adapter that changes what it computes, beside copies that are trained whole."""

    @staticmethod
    def fits(delta: Any) -> bool:
        """Whether an adapter of this kind has this delta."""
        return type(delta) is not Delta and not isinstance(delta, TokenRows)


class LoraLayer(BaseTunerLayer):
    """A module with a LoRA."""

    @staticmethod
    def fits(delta: Any) -> bool:
        """Whether it is LoRA's."""
        return isinstance(delta, LoraDelta)


class AuxiliaryTrainingWrapper(metaclass=_LayerKind):
    """A module of which an adapter trains a copy or some rows, beside the method's own changes."""

    @staticmethod
    def fits(delta: Any) -> bool:
        """Whether it is such a copy or such rows."""
        return isinstance(delta, TokenRows) or (type(delta) is Delta and delta.holds)


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module of which an adapter trains a copy."""

    @staticmethod
    def fits(delta: Any) -> bool:
        """Whether it is such a copy."""
        return type(delta) is Delta and delta.holds


# -- Methods by name.


if TYPE_CHECKING:
    PeftType: type[StrEnum]
    PEFT_TYPE_TO_CONFIG_MAPPING: dict[str, type[PeftConfig]]


def __getattr__(name: str) -> Any:
    """`PeftType`, an enum of strings, and `PEFT_TYPE_TO_CONFIG_MAPPING`, both of the methods that there are."""
    if name == "PeftType":
        value: Any = StrEnum("PeftType", {method: method for method in methods()})
    elif name == "PEFT_TYPE_TO_CONFIG_MAPPING":
        value = dict(methods())
    else:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    globals()[name] = value
    return value


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The config that these fields describe; `peft_type` says of which method. Raises: ConfigError."""
    if not config_dict.get("peft_type"):
        raise ConfigError("the fields don't say which method they are for: peft_type is missing")
    return PeftConfig.from_dict(config_dict)


# -- Attaching, reading, and the base's own tensors.


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: Any,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Any:
    """Attach an adapter, in place; gives back the same object. `get_peft_model` with its arguments the other way round.

    Args:
        state_dict: an adapter's tensors by their names on disk; its keys say which modules are adapted.

    Raises:
        ConfigError: a method that stands in front of the model and changes no module.
    """
    if peft_config.is_prompt_learning:
        raise ConfigError(f"{peft_config.peft_type} changes no module that it could be put into; use get_peft_model")
    if state_dict is not None:
        # `peft` compares keys by whole paths here, too; the factors' names begin behind `.lora_`.
        paths = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in state_dict} - {""}
        if paths:
            peft_config.target_modules = paths  # pyright: ignore[reportAttributeAccessIssue]
    return get_peft_model(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)


def load_peft_weights(
    model_id: str | Path, device: str | None = None, key_mapping: Mapping[str, str] | None = None, **hub: Any
) -> dict[str, Tensor]:
    """The tensors of an adapter folder or Hub repository by their names on disk. Raises: AdapterFileError."""
    subfolder = hub.pop("subfolder", None)
    tensors = read_adapter(adapter_folder(model_id, subfolder, **ReadOptions.of(hub).hub))
    if key_mapping:
        tensors = on_model(nn.Module(), tensors, key_mapping)
    return {name: tensor.to(device or "cpu") for name, tensor in tensors.items()}


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The tensors of the base alone, under the names that they have without adapters. Raises: ConfigError."""
    if not isinstance(model, PeftModel):
        raise ConfigError(f"a {type(model).__name__} has no adapters; its own state_dict() is the base's")
    return base_tensors(model)


@torch.no_grad()
def set_base_model_state_dict(model: Any, state_dict: Mapping[str, Tensor], strict: bool = True) -> _IncompatibleKeys:
    """Copy tensors, by their names without adapters, into the base; gives back the missing and the unexpected keys.

    Raises:
        BaseMismatchError: a tensor of another shape, or, if `strict`, one that is missing or left over; nothing is
            copied then.
        MergeError: adapters are merged into the tensors.
    """
    own = get_base_model_state_dict(model)
    for name in model.adapter_state.merged:
        model.adapter_state.check_unmerged(name, "load a base under")
    missing, strange = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
    if strict and (missing or strange):
        raise BaseMismatchError(
            "the state dict is of another base. "
            f"Missing key(s): {listing(missing, 3) or 'none'}. Unexpected key(s): {listing(strange, 3) or 'none'}"
        )
    shared = own.keys() & state_dict.keys()
    # All shapes before the first tensor is written: half a state dict in a base is worse than none.
    for name in shared:
        if own[name].shape != state_dict[name].shape:
            raise BaseMismatchError(
                f"'{name}' is {tuple(own[name].shape)} in the base, found {tuple(state_dict[name].shape)}"
            )
    for name in shared:
        own[name].copy_(state_dict[name])
    return _IncompatibleKeys(missing, strange)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is frozen to `dtype` and what learns to float32. Raises: ConfigError."""
    if dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(f"dtype must be torch.float16 or torch.bfloat16, found {dtype}")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            # Through `.data`: the parameter stays the object that an optimizer and tied modules hold.
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


# -- The scale of LoRA, and adapters that take each other's place without a compiler noticing.


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """The scale of every LoRA on the model multiplied for a while. Raises: ConfigError, where there is none."""
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float):
        raise ConfigError(f"multiplier must be a number, found {multiplier!r}")
    before = {module: module.scaling for module in model.modules() if isinstance(module, LoraDelta)}
    if not before:
        raise ConfigError("there is no LoRA on this model whose scale could be changed")
    try:
        for delta, scaling in before.items():
            delta.scaling = scaling * multiplier
        yield
    finally:
        for delta, scaling in before.items():
            delta.scaling = scaling


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Taken as in `peft`, where it leaves casting to hooks; here an input is cast for the adapter's product alone."""
    if active:
        warn("disable_input_dtype_casting has no effect: the base sees its input uncast")
    yield


def prepare_model_for_compiled_hotswap(
    model: Any, target_rank: int | None = None, config: PeftConfig | None = None, check_compiled: str = "error"
) -> None:
    """Pad the rank of every LoRA to `target_rank`, so that adapters up to that rank fit into the same compiled code.

    Padded rows of A and columns of B are zero, so that nothing changes.

    Args:
        check_compiled: what to do about a model that is compiled already: "error", "warn" or "ignore".

    Raises:
        ConfigError: the model is compiled already, or an adapter's rank is above the target.
    """
    if hasattr(model, "_orig_mod"):
        message = "the model is compiled already; call prepare_model_for_compiled_hotswap before torch.compile"
        if check_compiled == "error":
            raise ConfigError(message)
        if check_compiled == "warn":
            warn(message)
        elif check_compiled != "ignore":
            raise ConfigError(f'check_compiled must be "error", "warn" or "ignore", found {check_compiled!r}')
        model = model._orig_mod
    if target_rank is None:
        return
    loras = [delta for delta in model.modules() if isinstance(delta, LoraDelta)]
    for delta in loras:  # before the first is changed
        if delta.r > target_rank:
            raise ConfigError(
                f"an adapter has the rank {delta.r}, above target_rank={target_rank}; choose at least that"
            )
        if delta.r < target_rank:
            _check_can_pad(delta)
    for name, own in model.peft_config.items():
        patterns: dict[str, float] = {}
        for site, delta in attached(model, name):
            if isinstance(delta, LoraDelta):
                _pad(delta, target_rank)
                # s = alpha / r stays as it is with alpha = s r for the padded rank, and alpha = s sqrt(r) with rsLoRA.
                patterns[site.name] = delta.scaling * (math.sqrt(target_rank) if own.use_rslora else target_rank)
        if patterns:
            own.r, own.rank_pattern, own.alpha_pattern = target_rank, {}, patterns


def _check_can_pad(delta: Any) -> None:
    """Raises: ConfigError, where the ranks stand in groups, so that zeros at their end would move all but the first."""
    if getattr(delta, "groups", 1) > 1:
        raise ConfigError(
            f"the rank of a convolution in {delta.groups} groups can't be padded; leave it out of target_modules"
        )


def _pad(delta: LoraDelta, rank: int) -> None:
    a, b = delta.trained
    for factor, dim in ((a, 0), (b, 1)):
        missing = [*factor.shape]
        missing[dim] = rank - delta.r
        factor.data = torch.cat([factor.data, factor.new_zeros(missing)], dim)
    delta.r = rank


@torch.no_grad()
def hotswap_adapter(
    model: Any, model_name_or_path: str | Path, adapter_name: str, torch_device: str | None = None, **hub: Any
) -> None:
    """Put the LoRA of a folder or Hub repository into the tensors of one that the model has, also of a compiled model.

    A module that the new adapter doesn't change gets a zero B. A lower rank is padded with zeros. The stored scale is
    folded into B, since compiled code has the scale of the adapter that was there.

    Raises:
        ConfigError, MergeError: adapters of other methods or variants, or one that is merged.
        BaseMismatchError: the new adapter changes modules that the one in place doesn't, or has a higher rank.
    """
    model = getattr(model, "_orig_mod", model)
    model.adapter_state.check_known(adapter_name)
    model.adapter_state.check_unmerged(adapter_name, "replace")
    subfolder = hub.pop("subfolder", None)
    folder = adapter_folder(model_name_or_path, subfolder, **ReadOptions.of(hub).hub)
    config: Any = PeftConfig.from_pretrained(folder)
    own = model.peft_config[adapter_name]
    if own.peft_type != "LORA" or config.peft_type != "LORA" or own.use_dora != config.use_dora:
        raise ConfigError(f"a LoRA takes the place of a LoRA alone, both with use_dora or both without: '{folder}'")
    tensors = on_model(model, read_adapter(folder))
    placed = attached(model, adapter_name)
    known = {key(site.name, name) for site, delta in placed for name in delta.to_disk(delta.state_dict())}
    if tensors.keys() - known:
        raise BaseMismatchError(
            f"'{folder}' changes modules that the adapter '{adapter_name}' doesn't: "
            f"{listing(tensors.keys() - known, 3)}; load it under another name"
        )
    swaps: list[tuple[Any, dict[str, Tensor]]] = [
        (delta, _padded(site, delta, config, tensors, folder)) for site, delta in placed
    ]
    for delta, inside in swaps:
        for name, tensor in delta.state_dict().items():
            tensor.copy_(inside[name])


def _padded(site: Any, delta: Any, config: Any, tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The state of a delta with these tensors, at its own rank and scale."""
    stored: dict[str, Tensor] = {}
    for name, own in delta.to_disk(delta.state_dict()).items():
        new = tensors.get(key(site.name, name))
        padded = torch.zeros_like(own)
        if new is not None:
            if new.ndim != own.ndim or any(there > here for there, here in zip(new.shape, own.shape, strict=True)):
                raise BaseMismatchError(
                    f"'{name}' of '{site.name}' is {tuple(new.shape)} in '{folder}' and {tuple(own.shape)} in the "
                    "adapter in place; call prepare_model_for_compiled_hotswap with the highest rank first"
                )
            if new.shape != own.shape:
                _check_can_pad(delta)
            padded[tuple(slice(side) for side in new.shape)] = new.to(own.device, own.dtype)
        # A module that the new adapter leaves alone: with B zero any A does, and DoRA's m must stay ||W||, not zero.
        elif name.startswith(("lora_A", "lora_magnitude")):
            padded = own
        stored[name] = padded
    inside = delta.from_disk(stored)
    # The bias of B is inside of the scale, too.
    for factor in {delta.factors[1], "lora_bias"} & inside.keys():
        inside[factor] = inside[factor] * (config.scale_for(site.name) / delta.scaling)
    return inside
