"""What an adapter trains, to be shown before anything is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from slimtune.adapters.adapter import attached
from slimtune.adapters.targets import text_model_of
from slimtune.core.frozen import dtypes_of, walk


class ModuleGroup(NamedTuple):
    """The modules of one name: how many are trained, how many there are, and the dtypes of both."""

    trained: int
    there: int
    parameters: int
    dtypes: str


@dataclass(frozen=True)
class Summary:
    """The trainable parameters of an adapter, by the last component of the modules' paths.

    Attributes:
        rows: by module name.
        trainable: parameters of the adapter.
        total: parameters of the model with its adapters.
        stored_bytes: what the adapter will take on disk.
        unmergeable: why the adapter can't be merged, so that it is run at inference; empty where it can.
        text_model: of a multimodal model, the path of the text model where that alone is adapted; else empty.
    """

    adapter: str
    rows: dict[str, ModuleGroup]
    trainable: int
    total: int
    stored_bytes: int
    unmergeable: str = ""
    text_model: str = ""

    def __str__(self) -> str:
        width = max(map(len, self.rows), default=0)
        lines = [
            f"  {name:<{width}}  {row.trained:>4} of {row.there:<4} {row.parameters:>12,} parameters, {row.dtypes}"
            for name, row in self.rows.items()
        ]
        share = f"{self.trainable:,} of {self.total:,} parameters are trained ({self.trainable / self.total:.2%})"
        size = f"{share}, {self.stored_bytes / 1e6:.1f} MB on disk"
        alone = f"of this multimodal model only {self.text_model} is adapted; name others with target_modules"
        notes = [alone] * bool(self.text_model) + [self.unmergeable] * bool(self.unmergeable)
        return "\n".join([f"adapter '{self.adapter}':", *lines, size, *notes])


def summary_of(model: Any, adapter_name: str) -> Summary:
    """Which modules an adapter trains, how many of how many, in which dtypes."""
    rows: dict[str, ModuleGroup] = {}
    last_names = [name.rpartition(".")[2] for name, _ in walk(model)]
    stored_bytes, unmergeable, text_model = 0, "", text_model_of(model) or ""
    for site, delta in attached(model, adapter_name):
        last = site.name.rpartition(".")[2]
        own = list(delta.parameters())
        unmergeable = unmergeable or delta.unmergeable
        text_model = text_model if site.name.startswith(f"{text_model}.") else ""
        if not own:
            continue
        before = rows[last] if last in rows else ModuleGroup(0, last_names.count(last), 0, "")
        parameters = before.parameters + sum(p.numel() for p in own)
        rows[last] = ModuleGroup(
            before.trained + 1, before.there, parameters, f"{dtypes_of(own)} on {site.base.stored_as(site.module)}"
        )
        stored_bytes += sum(p.numel() * p.element_size() for p in own)
    trainable = sum(row.parameters for row in rows.values())
    total = sum(parameter_count(p) for p in model.parameters())
    return Summary(adapter_name, rows, trainable, total, stored_bytes, unmergeable, text_model)


def parameter_count(parameter: Any) -> int:
    """How many numbers a parameter stands for, which is more than what is stored of codes."""
    state = getattr(parameter, "quant_state", None)
    # bitsandbytes packs two 4-bit codes into a byte: `numel` counts bytes, the state has the shape.
    return parameter.numel() if state is None else math.prod(state.shape)
