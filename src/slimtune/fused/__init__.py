"""Fused mathematics: faster ways to compute what a delta's formula says, one table of them.

An entry must equal the plain formula; a test over the table says so.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

Fused = Callable[..., Any]
"""`fused(delta, module, base, x)`: what `delta.forward(base, x)` computes, or that very call where it can't."""

_table: dict[tuple[type, type], Fused] = {}


def fuses(delta_type: type, base_type: type) -> Callable[[Fused], Fused]:
    """Enter a fused function for a delta on a kind of base; it serves their subclasses too."""

    def enter(function: Fused) -> Fused:
        _table[delta_type, base_type] = function
        return function

    return enter


@functools.cache
def table() -> dict[tuple[type, type], Fused]:
    """All fused functions by (delta type, base type)."""
    for info in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{info.name}")
    return _table


@functools.cache
def fused_for(delta_type: type, base_type: type) -> Fused | None:
    """The fused function for a delta on a base, if there is one for that delta's very equation."""
    for (delta, base), function in table().items():
        # A subclass with a forward of its own has another equation, which an inherited entry would pass over in
        # silence.
        same_equation = issubclass(delta_type, delta) and delta_type.forward is delta.forward
        if same_equation and issubclass(base_type, base):
            return function
    return None
