"""What each of several devices holds of a 70B model, planned: the tables of docs/scale.md.

python -m benchmarks.plan_scale
"""

from __future__ import annotations

from typing import Any

from benchmarks.machine import ROOT
from benchmarks.page import fill, table
from slimtune.plan.devices import find
from slimtune.plan.memory import FSDP2, MemoryPlan, Sharing
from slimtune.plan.plan import plan

PAGE, H100 = ROOT / "docs" / "scale.md", find("H100")
DEVICES = (2, 4, 8)
DDP, OFFLOADED = Sharing(shards=False), Sharing(offloads=True)
WAYS: dict[str, tuple[dict[str, Any], dict[str, Sharing]]] = {
    "LoRA, bf16": ({"methods": ["lora"], "bases": ["dense"]}, {"DDP": DDP, "FSDP2": FSDP2}),
    "QLoRA, NF4": ({"methods": ["lora"], "bases": ["nf4"]}, {"DDP": DDP, "FSDP2": FSDP2}),
    "all weights": ({"methods": ["full"]}, {"FSDP2": FSDP2, "FSDP2, offloaded": OFFLOADED}),
}
PUBLIC = [
    ("QLoRA, 2 x 2,048 tokens, 2 GPUs", "QLoRA, NF4", FSDP2, 2, 2, "35.6"),
    ("the same, offloaded", "QLoRA, NF4", OFFLOADED, 2, 2, "19.6"),
    ("LoRA, 8 x 2,048 tokens, 8 GPUs", "LoRA, bf16", FSDP2, 8, 8, "72 to 80"),
]
"""What peft's documentation measured: by way, devices, and examples on each at once."""


def planned(way: str, **options: Any) -> MemoryPlan:
    """The step on one device, which is the same step on each of several."""
    report = plan("llama-3-70b", device=H100, devices=8, gradient_checkpointing=True, **options, **WAYS[way][0])
    return report.choices[0].plan


def needed(step: MemoryPlan, sharing: Sharing, count: int) -> str:
    """GB of each device, in brackets where it has less."""
    live = step.sharded(count, sharing).total
    size = f"{H100.needed_bytes(live) / 1e9:.0f}"
    return size if H100.takes(live) else f"({size})"


def main() -> None:
    """Fill the page's tables."""
    rows = []
    for way, (_, sharings) in WAYS.items():
        step = planned(way, batch_size=1, max_length=512)
        for label, sharing in sharings.items():
            rows.append((f"{way}, {label}", *(needed(step, sharing, count) for count in DEVICES)))
    fill(PAGE, "scale", table(("", *(f"{count} x H100" for count in DEVICES)), rows))
    beside = []
    for label, way, sharing, count, batch, measured in PUBLIC:
        step = planned(way, batch_size=batch, max_length=2048, rank=8)
        beside.append((label, needed(step, sharing, count), measured))
    fill(PAGE, "public", table(("", "planned, Llama-3", "measured, Llama-2"), beside))


if __name__ == "__main__":
    main()
