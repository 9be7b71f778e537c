"""What a base is stored as: which modules in which numbers, and how many bytes they take."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from slimtune.bases import base_of
from slimtune.targets import walk

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


@dataclass(frozen=True)
class Parts:
    """What a base is stored as, by kind of number; adapters are left out."""

    rows: dict[str, Part]

    @property
    def bytes(self) -> int:
        """What all of it takes."""
        return sum(part.bytes for part in self.rows.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON: by kind of number the modules and bytes."""
        return {name: {"modules": dict(part.modules), "bytes": part.bytes} for name, part in self.rows.items()}

    def __str__(self) -> str:
        width = max(map(len, self.rows), default=0)
        lines = [
            f"  {name:<{width}}  {part.bytes / 1e6:>10,.1f} MB  "
            + ", ".join(f"{count:,} {kind}{'s' if count > 1 else ''}" for kind, count in part.modules.items())
            for name, part in sorted(self.rows.items(), key=lambda row: -row[1].bytes)
        ]
        return "\n".join([f"the base, {self.bytes / 1e6:,.1f} MB:", *lines])


def parts(model: nn.Module) -> Parts:
    """Which modules of a base are stored as which numbers, and how many bytes they take; `print` it."""
    rows: dict[str, Part] = {}
    seen: set[int] = set()
    for _, module in walk(model):
        base = base_of(module)
        held = [tensor for tensor in base.held(module) if id(module) not in seen]
        seen.add(id(module))
        if not held:
            continue
        part = rows.setdefault(base.stored_as(module), Part())
        part.modules[_NAMES.get(base.kind) or _other(module)] += 1
        for tensor in held:
            # Codes and scales may be held twice, and tied weights are one tensor.
            key = tensor.data_ptr() or id(tensor)
            part.bytes += 0 if key in seen else _bytes(tensor)
            seen.add(key)
    return Parts(rows)


def _other(module: nn.Module) -> str:
    return "norm" if "norm" in type(module).__name__.lower() else "other"


def _bytes(tensor: Any) -> int:
    """What is stored of a tensor, which of a packed one is less than it looks."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes
