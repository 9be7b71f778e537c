"""The kinds of frozen weight, one file each; a file enrols itself by being here."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from torch import nn

from slimtune.delta import Base


@functools.cache
def _bases() -> tuple[Base, ...]:
    found: list[Base] = []
    for info in pkgutil.iter_modules(__path__):
        found.extend(importlib.import_module(f"{__name__}.{info.name}").BASES)
    return tuple(found)


@functools.cache
def base_of(module_type: type[nn.Module]) -> Base:
    """The base for a module type: the one declared for its nearest ancestor."""
    by_type = {declared: base for base in _bases() for declared in base.module_types}
    return next(by_type[ancestor] for ancestor in module_type.__mro__ if ancestor in by_type)
