"""Where an adapter's constraint holds: which of its deltas are constrained, and which layers are besides.

And the zeros of a pruned model: which layers have them, and that they stay.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from slimtune.bases import base_of
from slimtune.bases.packed import PackedLinear
from slimtune.core.constrained import Constrained, Grid, Mask
from slimtune.core.constraint import ConstraintConfig
from slimtune.core.delta import Delta
from slimtune.core.frozen import Site, walk
from slimtune.errors import ConfigError, listing

Placed = list[tuple[Site, Delta]]
PRUNED = 0.05
"""From this share of zeros on a model counts as pruned: one that isn't has hardly any."""


def constrained(model: nn.Module, config: Any, placed: Placed) -> Placed:
    """The deltas of an adapter, constrained as its config says, and layers that are on the grid without being trained.

    Raises:
        ConfigError: a method or layer that can't be constrained, groups that don't divide a width.
    """
    wanted: ConstraintConfig | None = getattr(config, "constraint", None)
    if not wanted:
        return placed
    _check_config(config)
    on_grid: set[str] = set()
    if wanted.num_bits is not None:
        # Codes that are there decide which layers are on the grid; only a plain base is asked which would be quantized.
        packed = [name for name, module in walk(model) if _grid_of(Site(name, module, base_of(module)))]
        # transformers' quantizers import torchao, which takes seconds.
        from slimtune.quantization.linears import group_size_for, quantized_linears

        on_grid = set(packed or quantized_linears(model, wanted.ignore))
        if wanted.group_size is not None and not packed:
            group_size_for(model, sorted(on_grid), wanted.group_size, option="constraint.ignore")
    result: Placed = []
    for site, delta in placed:
        result.append((site, _constrained(site, delta, wanted, site.name in on_grid)))
        on_grid.discard(site.name)
    # What has no delta is quantized as well: the others learn to make up for it.
    for name in sorted(on_grid):
        module = model.get_submodule(name)
        site = Site(name, module, base_of(module))
        result.append((site, _constrained(site, Delta(), wanted, True)))
    # A method that changes no weight with zeros keeps them anyway.
    if wanted.mask and not any(_has_zeros(Site(name, m, base_of(m))) for name, m in walk(model)):
        raise ConfigError(
            "constraint.mask keeps zeros, and the model has none; prune it first with slimtune prune, or leave "
            "constraint.mask out"
        )
    return result


def _check_config(config: Any) -> None:
    """Raises: ConfigError, for noise that the merged weight has no place for."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if str(getattr(config, "init_lora_weights", "")).lower() == "eva":
        raise ConfigError("EVA changes the ranks of layers that are constrained by then; choose another start")
    drops = [name for name, value in fields.items() if name.endswith("dropout") and value]
    if drops:
        raise ConfigError(
            f"with a constraint the merged weight is what is trained, in which {listing(drops)} has no place; set it "
            "to 0"
        )


def _constrained(site: Site, delta: Delta, wanted: ConstraintConfig, is_on_grid: bool) -> Delta:
    """The delta with the constraints that hold at its site; the delta itself where none does."""
    constraints: dict[str, Any] = {}
    if site.base.dequantizer(site.module) is not None:
        _check_stored(site, wanted)
    if is_on_grid:
        assert wanted.num_bits is not None
        # A base of codes keeps its scales: searched anew they would move weights that nothing has trained yet.
        start_OG = getattr(site.module, "weight_scale", None)
        constraints["grid"] = Grid(site, wanted.num_bits, wanted.group_size, wanted.learn_scales, start_OG)
    if wanted.mask and _has_zeros(site):
        # Behind the grid, which rounds what the adapter adds to a zero to some code: the mask sets it to 0 again.
        constraints["mask"] = Mask(site, holds_weight="weight" in delta.stand_ins())
    if not constraints:
        return delta
    if site.kind not in ("linear", "conv"):
        raise ConfigError(
            f"the zeros of '{site.name}', a {type(site.module).__name__}, can't be kept; name its linear layers in "
            "target_modules, or exclude it"
        )
    if delta.unmergeable:
        if not is_on_grid:
            return delta  # it changes no weight, and so no zero
        raise ConfigError(f"a grid is one of merged weights, and {delta.unmergeable}")
    return Constrained(delta, constraints, site.base)


def _check_stored(site: Site, wanted: ConstraintConfig) -> None:
    """Raises: ConfigError, for a quantized layer that isn't on the grid that is asked for."""
    stored, own = site.base.stored_as(site.module), _grid_of(site)
    if wanted.mask or own is None:
        raise ConfigError(
            f"'{site.name}' is stored as {stored}, and a constraint is one on weights in 16 or 32 bits, or the "
            "symmetric grid of int4 and int8; load the base in 16 bits, or leave constraint out"
        )
    (bits, size), width = own, site.base.features(site.module)[0]
    if own != (wanted.num_bits, wanted.group_size or width):
        groups = f", constraint.group_size={size}" if size != width else ""
        raise ConfigError(
            f"'{site.name}' is stored on another grid than that of the constraint, {stored}; set constraint.num_bits="
            f"{bits}{groups}"
        )


def _grid_of(site: Site) -> tuple[int, int] | None:
    """Bits and group size of the codes that a layer is stored as."""
    return site.base.grid_of(site.module) if isinstance(site.base, PackedLinear) else None


@torch.no_grad()
def _has_zeros(site: Site) -> bool:
    """Whether a matrix or kernel that the module itself owns has a weight of exactly zero."""
    if site.kind == "embedding":
        return False
    # Vectors are left out: biases and shifts are often exactly 0 in a model that nobody pruned.
    own = [p for p in site.module.parameters(recurse=False) if p.ndim > 1 and p.is_floating_point()]
    # On the meta device, where a plan simulates, there are no values to ask.
    return any(not p.is_meta and bool((p == 0).any()) for p in own)


def constraint_of(model: Any) -> ConstraintConfig | None:
    """What the adapters of a model hold its merged weights to; None where nothing is said."""
    given = (getattr(config, "constraint", None) for config in getattr(model, "peft_config", {}).values())
    return next((constraint for constraint in given if constraint is not None), None)


def block_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear and convolution layers in the repeated blocks, or all where there are no such blocks, by path."""
    modules = dict(walk(model))
    layers = {name: module for name, module in modules.items() if base_of(module).kind in ("linear", "conv")}
    lists = tuple(f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList))
    in_blocks = {name: module for name, module in layers.items() if name.startswith(lists)}
    return in_blocks or layers


@torch.no_grad()
def zero_share(model: nn.Module) -> float:
    """The share of zeros among the weights of the layers of the blocks, expanded where they are codes."""
    others = total = 0
    for module in block_layers(model).values():
        weight = base_of(module).weight(module)
        # A quarter of what a comparison takes, which makes a mask to be added up.
        others, total = others + int(torch.count_nonzero(weight)), total + weight.numel()
    return (total - others) / max(1, total)


@torch.no_grad()
def _without_zeros(weight: Any) -> None:
    """No gradient where the weight is zero: no optimizer moves it then, and weight decay keeps it as it is."""
    weight.grad.mul_(weight != 0)


def keep_zeros(model: nn.Module, config: Any = None) -> None:
    """See that the zeros of a pruned model stay: under an adapter of this config, or in a full tuning without one.

    A config that says something of a constraint itself is left as it is, as is one of a quantized model.
    """
    quantized = any(base_of(module).dequantizer(module) is not None for module in block_layers(model).values())
    if quantized or zero_share(model) < PRUNED:
        return
    if config is None:
        for module in block_layers(model).values():
            weight: Any = module.weight
            # On `.grad` in place, before the optimizer reads it; a tensor's own hook would have to copy each gradient.
            weight.register_post_accumulate_grad_hook(_without_zeros)
    elif getattr(config, "constraint", False) is None:
        config.constraint = ConstraintConfig(mask=True)
