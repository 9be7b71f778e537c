"""A quantized model as the plain one that it was made from: weights expanded, the account of quantization gone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.bases import base_of, claim, follow_class
from slimtune.bases.packed import PackedLinear
from slimtune.core.frozen import walk
from slimtune.errors import ConfigError, listing
from slimtune.storage.quantization_metadata import strip_quantization_metadata

Expanded = list[tuple[nn.Module, PackedLinear, Tensor]]
"""The quantized modules of a model, their kinds, and their weights (out, in) in floating point."""


def dequantize(model: Any, dtype: torch.dtype | None = None) -> Any:
    """The same model, in place, with plain layers for the quantized ones, their weights what the codes stand for.

    It saves, loads and trains as any plain model. One that isn't quantized stays as it is.

    Args:
        dtype: of the expanded weights and of all that had the model's dtype; without it, that stays.

    Raises:
        ConfigError: adapters are attached, or something is quantized in a way that can't be expanded; nothing is
            changed then.
    """
    if hasattr(model, "peft_config"):
        raise ConfigError(
            f"the model has the adapters {listing(model.peft_config)}; call merge_and_unload(), which expands it as "
            "well, or unload() first"
        )
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(f"dtype must be a floating-point type such as torch.bfloat16, found {dtype}")
    claim(model)
    own = plain_dtype(model)
    # All weights are expanded before anything is changed, so that a failure leaves the model as it was.
    make_plain(model, expanded(model, dtype or own))
    if dtype is not None:
        for parameter in model.parameters():
            # What is kept in another type on purpose stays in it.
            if parameter.dtype == own:
                parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def expanded(model: Any, dtype: torch.dtype | None) -> Expanded:
    """The weights of all quantized modules in floating point; nothing is changed.

    Raises:
        ConfigError: something is quantized in a way that can't be expanded.
    """
    packed = _packed(model)
    known = {id(module) for module, _ in packed}
    for path, module in walk(model):
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_floating_point() and id(module) not in known:
                raise ConfigError(
                    f"'{path}' is a {type(module).__name__} whose {name} is stored as {parameter.dtype}, which can't "
                    "be expanded; load the model with that module in 16 bits"
                )
    if not packed and vars(model).get("is_quantized"):
        raise ConfigError(
            f"the model is quantized by {getattr(model, 'quantization_method', 'a library')!s} in a way that can't be "
            "expanded; load the base in 16 bits"
        )
    weights = [(module, base, base.weight(module).detach()) for module, base in packed]
    # Rounded once, from what the codes stand for.
    return [(module, base, weight_OI.to(dtype or weight_OI.dtype)) for module, base, weight_OI in weights]


@torch.no_grad()
def make_plain(model: Any, weights: Expanded) -> Any:
    """Give the quantized modules, without any adapter now, their plain classes with these weights.

    They need gradients where anything of the model does, as if it had never been quantized.
    """
    trained = any(parameter.requires_grad for parameter in model.parameters())
    plain: dict[int, tuple[Any, Any]] = {}
    for module, base, weight_OI in weights:
        # A library may hold its codes by another name, and share none of them.
        codes = getattr(module, "weight", module)
        base.make_plain(module, weight_OI)
        # Of one weight in two modules one is made again; the codes are kept, so that no other tensor gets their id.
        _, first = plain.setdefault(id(codes), (codes, module.weight))
        module._parameters["weight"] = first
        # accelerate's hooks keep a forward of the class that was.
        follow_class(module)
        module.requires_grad_(trained)
    if weights:
        strip_quantization_metadata(model)
        untie_if_changed(model)
    return model


def plain_dtype(model: Any) -> torch.dtype | None:
    """The dtype that most of what isn't quantized has, adapters left out; None where there is nothing else."""
    packed = {id(module) for module, _ in _packed(model)}
    sizes: Counter[torch.dtype] = Counter()
    for _, module in walk(model):
        if id(module) not in packed:
            for parameter in module.parameters(recurse=False):
                # By numbers and not by tensors: a few norms in float32 don't make a float32 model.
                sizes[parameter.dtype] += parameter.numel() if parameter.is_floating_point() else 0
    return sizes.most_common(1)[0][0] if +sizes else None


def _packed(model: nn.Module) -> list[tuple[nn.Module, PackedLinear]]:
    """The modules that a library quantized, also those that hold a floating weight for now."""
    modules = {id(module): module for _, module in walk(model)}.values()
    found = [(module, base_of(module)) for module in modules]
    return [(module, base) for module, base in found if isinstance(base, PackedLinear)]


def untie_if_changed(model: Any) -> None:
    """Take the ties that a merge undid out of the model's own account of them, so that a save stores both ends.

    Where none is left, the config says so. Where some are, as between T5's embeddings, a reload finds both ends of the
    others in the file and leaves them apart.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if not tied:
        return
    # A module that holds codes has them by other names in a state dict; where they are expanded, these are gone.
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.state_dict(keep_vars=True))
    still = {end: source for end, source in tied.items() if end in own and own[end] is own.get(source)}
    if len(still) == len(tied):
        return
    # transformers asks both: a save leaves out what it takes for tied, and a load ties it again.
    model.all_tied_weights_keys = still
    model.__dict__["_tied_weights_keys"] = still or None
    if not still:
        model.config.tie_word_embeddings = False
