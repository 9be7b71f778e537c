"""What an adapter trains, to be shown before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slimtune.adapter import attached
from slimtune.targets import walk


@dataclass(frozen=True)
class Coverage:
    """What an adapter trains, by the last component of the modules' paths.

    Attributes:
        rows: by module name: how many of them are trained, how many there are, trainable parameters.
        trainable: parameters of the adapter.
        total: parameters of the model with its adapters.
    """

    adapter: str
    rows: dict[str, tuple[int, int, int]]
    trainable: int
    total: int

    def __str__(self) -> str:
        width = max(map(len, self.rows), default=0)
        lines = [
            f"  {name:<{width}}  {hit:>4} of {there:<4} {parameters:>12,} parameters"
            for name, (hit, there, parameters) in self.rows.items()
        ]
        share = f"{self.trainable:,} of {self.total:,} parameters are trained ({self.trainable / self.total:.2%})"
        return "\n".join([f"adapter '{self.adapter}':", *lines, share])


def coverage(model: Any, adapter_name: str) -> Coverage:
    """Which modules an adapter trains, how many of how many."""
    rows: dict[str, tuple[int, int, int]] = {}
    last_names = [name.rpartition(".")[2] for name, _ in walk(model)]
    for site, delta in attached(model, adapter_name):
        last = site.name.rpartition(".")[2]
        hit, _, parameters = rows.get(last, (0, 0, 0))
        rows[last] = hit + 1, last_names.count(last), parameters + sum(p.numel() for p in delta.parameters())
    trainable = sum(parameters for _, _, parameters in rows.values())
    return Coverage(adapter_name, rows, trainable, sum(p.numel() for p in model.parameters()))
