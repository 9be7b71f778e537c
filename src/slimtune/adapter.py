"""One adapter on one model: drafted, filled from stored tensors, attached, read out again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.adopt import Adopted, adopt
from slimtune.bases import base_of
from slimtune.delta import Delta, PeftConfig, Site
from slimtune.errors import AdapterExistsError, BaseMismatchError, ConfigError, listing
from slimtune.storage.peft_format import KEY_PREFIX, check_adapter_name
from slimtune.targets import resolve, walk

Draft = list[tuple[Site, Delta]]
"""The deltas of one adapter with their sites."""


def draft(model: Any, name: str, config: PeftConfig, autocast_adapter_dtype: bool, strict: bool) -> Draft:
    """All deltas of a new adapter, none attached yet: an error leaves the model as it was.

    Args:
        strict: every pattern of the config must match; off for a config that was read from a file.

    Raises:
        TargetError, ConfigError, AdapterExistsError: as `get_peft_model`.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"an adapter attaches to a torch.nn.Module, found a {type(model).__name__}")
    check_adapter_name(name)
    if name in getattr(model, "peft_config", {}):
        raise AdapterExistsError(
            f"the model already has an adapter '{name}'; choose another name or delete it with delete_adapter"
        )
    targets = resolve(model, config, strict)
    deltas = {id(site.module): (site, config.delta_for(site, autocast_adapter_dtype)) for site in targets.sites}
    for site in targets.whole:
        deltas[id(site.module)] = (site, Delta())
        deltas[id(site.module)][1].hold_all(site.module)
    for site in targets.biases:
        deltas.setdefault(id(site.module), (site, Delta()))[1].hold(site.module, "bias")
    return list(deltas.values())


def attach(model: Any, name: str, drafted: Draft) -> None:
    """Put the deltas at their sites, not active yet."""
    for site, delta in drafted:
        delta.train(site.module.training).requires_grad_(False)
        adopt(site.module, model.adapter_switch).deltas[name] = delta


def adopted_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """All adopted modules by their first path."""
    seen: dict[int, tuple[str, Any]] = {}
    for name, module in walk(model):
        if isinstance(module, Adopted):
            seen.setdefault(id(module), (name, module))
    return list(seen.values())


def attached(model: Any, name: str) -> Draft:
    """The deltas of an adapter that the model has."""
    return [
        (Site(path, module, base_of(type(module))), module.deltas[name])
        for path, module in adopted_modules(model)
        if name in module.deltas
    ]


def stored_names(site: Site, delta: Delta) -> dict[str, str]:
    """By the name of each parameter and buffer in the delta: its name on disk."""
    own = (*delta.named_parameters(), *delta.named_buffers())
    return {name: f"{KEY_PREFIX}{site.name}.{delta.disk_name(name)}" for name, _ in own}


def fill(drafted: Draft, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy stored tensors into an adapter's deltas, each into its own.

    Raises:
        BaseMismatchError: a tensor is missing, left over or of another shape; nothing is copied then.
    """
    own: dict[str, Tensor] = {}
    for site, delta in drafted:
        values = dict(delta.named_parameters()) | dict(delta.named_buffers())
        own |= {stored: values[name] for name, stored in stored_names(site, delta).items()}
    missing, strange = own.keys() - tensors.keys(), _strangers(drafted, tensors, set(own))
    if missing or strange:
        what = f"it lacks {listing(missing, 3)}" if missing else f"it holds {listing(strange, 3)} besides"
        raise BaseMismatchError(
            f"'{source}' was made for another base or other targets: {what}; "
            f"{len(own.keys() & tensors.keys())} of {len(own)} tensors match"
        )
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise BaseMismatchError(
                f"'{source}' was made for another base: '{name}' is {tuple(tensors[name].shape)} in the file and "
                f"{tuple(tensor.shape)} on this model"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _strangers(drafted: Draft, tensors: Mapping[str, Tensor], own: set[str]) -> set[str]:
    """Stored tensors that no delta takes; copies of the base's own embeddings, which `peft` may add, are none."""
    bases = {f"{KEY_PREFIX}{site.name}.base_layer.weight": site.module for site, _ in drafted}
    return {
        name
        for name in tensors.keys() - own
        if name not in bases or not torch.equal(bases[name].get_parameter("weight").cpu(), tensors[name])
    }


def adapter_tensors(model: Any, name: str, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of one adapter by their names on disk, gathered where they are sharded.

    Args:
        state_dict: the model's tensors by name, where its own are not at hand.
    """
    found: dict[str, Tensor] = {}
    for site, delta in attached(model, name):
        own = dict(delta.named_parameters()) | dict(delta.named_buffers())
        for inside, stored in stored_names(site, delta).items():
            tensor: Any = (state_dict or {}).get(f"{site.name}.deltas.{name}.{inside}", own[inside])
            found[stored] = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()
    return found
