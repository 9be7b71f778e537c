"""The kinds of frozen weight, one file each; a file enrols itself by being here."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from slimtune.core.frozen import Base, walk
from slimtune.errors import DamagedBaseError

_LIBRARIES = ("bitsandbytes", "torchao")
"""Files named after a library that they import, which takes seconds: they count once a model has something from it."""


def _files() -> tuple[Any, ...]:
    # A library's file counts once it is imported: what isn't can't have made a module of this model.
    names = (info.name for info in pkgutil.iter_modules(__path__))
    return _imported(tuple(n for n in names if n not in _LIBRARIES or f"{__name__}.{n}" in sys.modules))


@functools.cache
def _imported(names: tuple[str, ...]) -> tuple[Any, ...]:
    files = [importlib.import_module(f"{__name__}.{name}") for name in names]
    # What claims any foreign layer comes last, after those that know their library.
    return tuple(sorted(files, key=lambda file: getattr(file, "GENERIC", False)))


def _import_libraries_of(types: Iterable[type]) -> None:
    """Import the file of each library that one of these types, or an ancestor of it, comes from."""
    # Ancestors as well: a model's own subclass of bitsandbytes' layer comes from the model's module.
    roots = {ancestor.__module__.partition(".")[0] for each in types for ancestor in each.__mro__}
    for library in roots.intersection(_LIBRARIES):
        importlib.import_module(f"{__name__}.{library}")


def base_of(module: nn.Module) -> Base:
    """The base of a module: the one that it was claimed for, or else that of its type."""
    return module.__dict__.get("adopted_base") or base_of_type(type(module))


@functools.cache
def base_of_type(module_type: type[nn.Module]) -> Base:
    """The base for a module type: the one declared for its nearest ancestor."""
    _import_libraries_of([module_type])
    by_type = {declared: base for file in _files() for base in file.BASES for declared in base.module_types}
    # By the method resolution order, so that the nearest declared ancestor wins; `nn.Module` itself is declared.
    named = [key for ancestor in module_type.__mro__ for key in (ancestor, _full_name(ancestor))]
    return next(by_type[key] for key in named if key in by_type)


def _full_name(module_type: type) -> str:
    return f"{module_type.__module__}.{module_type.__qualname__}"


def claim(model: nn.Module) -> None:
    """Find the modules that another library quantized; where their storage is known, our own product takes over.

    Raises:
        DamagedBaseError: what is stored of a weight doesn't fit together.
    """
    # Without the adapters, of which a server has hundreds: they stand on the base and are none of it.
    modules = list(walk(model))
    _import_libraries_of({type(x) for _, module in modules for x in (module, *module._parameters.values())})
    dtype = getattr(model, "dtype", None)
    for file in _files():
        if hasattr(file, "claim"):
            for path, module in modules:
                was = type(module)
                try:
                    file.claim(module, dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype())
                except DamagedBaseError as error:
                    raise DamagedBaseError(
                        f"the quantized weight '{path}.weight' is damaged: {error}; fetch the model again"
                    ) from error
                if type(module) is not was:
                    follow_class(module)


def follow_class(module: nn.Module) -> None:
    """Let hooks of accelerate, which noted the forward of the class that a module had, run that of its class now."""
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = type(module).forward.__get__(module)
