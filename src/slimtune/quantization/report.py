"""What a base is stored as: which modules in which numbers, and how many bytes they take."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from slimtune.bases import base_of
from slimtune.core.frozen import walk

_NAMES = {"linear": "linear layer", "embedding": "embedding", "conv": "convolution"}


@dataclass
class Part:
    """The modules that are stored as the same numbers.

    Attributes:
        modules: how many there are of each kind.
        bytes: what they take, with scales and tables; a tensor that two modules share counts where it comes first.
    """

    modules: Counter[str] = field(default_factory=Counter)
    bytes: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {kind}{'s' if count > 1 else ''}" for kind, count in self.modules.items())


@dataclass(frozen=True)
class Parts:
    """What a base is stored as, by kind of number; adapters are left out."""

    rows: dict[str, Part]

    @property
    def bytes(self) -> int:
        """What all of it takes."""
        return sum(part.bytes for part in self.rows.values())

    @property
    def line(self) -> str:
        """All of it in one line."""
        return "; ".join(f"{part} in {name}, {part.bytes / 1e6:,.1f} MB" for name, part in self._sorted())

    def to_dict(self) -> dict[str, Any]:
        """For JSON: by kind of number the modules and bytes."""
        return {name: {"modules": dict(part.modules), "bytes": part.bytes} for name, part in self.rows.items()}

    def __str__(self) -> str:
        width = max(map(len, self.rows), default=0)
        lines = [f"  {name:<{width}}  {part.bytes / 1e6:>10,.1f} MB  {part}" for name, part in self._sorted()]
        return "\n".join([f"the base, {self.bytes / 1e6:,.1f} MB:", *lines])

    def _sorted(self) -> list[tuple[str, Part]]:
        return sorted(self.rows.items(), key=lambda row: -row[1].bytes)


def parts(model: nn.Module) -> Parts:
    """Which modules of a base are stored as which numbers, and how many bytes they take; `print` it."""
    rows: dict[str, Part] = {}
    counted: set[int] = set()
    # A module under two paths is stored once.
    for module in {id(module): module for _, module in walk(model)}.values():
        base = base_of(module)
        held = base.held(module)
        if not held:
            continue
        part = rows.setdefault(base.stored_as(module), Part())
        part.modules[_NAMES.get(base.kind) or _other(module)] += 1
        for tensor in held:
            # Tied weights are one tensor; one that packs others has no memory of its own.
            key = id(tensor) if _is_packed(tensor) else tensor.data_ptr() or id(tensor)
            part.bytes += 0 if key in counted else _bytes(tensor)
            counted.add(key)
    return Parts(rows)


def _other(module: nn.Module) -> str:
    return "norm" if "norm" in type(module).__name__.lower() else "other"


def _bytes(tensor: Any) -> int:
    """What is stored of a tensor, which of a packed one is less than it looks."""
    if hasattr(tensor, "full_tensor"):
        # Sharded over several devices: all of its shards.
        return tensor.numel() * tensor.element_size()
    if _is_packed(tensor):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def _is_packed(tensor: Any) -> bool:
    return hasattr(tensor, "__tensor_flatten__")
