"""What each of several devices holds of a 70B model, planned: the table of docs/scale.md.

python -m benchmarks.plan_scale
"""

from __future__ import annotations

from typing import Any

from benchmarks.machine import ROOT
from benchmarks.page import fill, table
from slimtune.plan.memory import FSDP2, Sharing
from slimtune.plan.plan import plan

PAGE = ROOT / "docs" / "scale.md"
LORA = {"methods": ["lora"], "bases": ["dense"]}
QLORA = {"methods": ["lora"], "bases": ["nf4"]}
FULL = {"methods": ["full"]}
WAYS: dict[str, tuple[dict[str, Any], Sharing]] = {
    "LoRA, bf16, DDP": (LORA, Sharing(shards=False)),
    "LoRA, bf16, FSDP2": (LORA, FSDP2),
    "QLoRA, NF4, DDP": (QLORA, Sharing(shards=False)),
    "QLoRA, NF4, FSDP2": (QLORA, FSDP2),
    "all weights, FSDP2": (FULL, FSDP2),
    "all weights, FSDP2, offloaded": (FULL, Sharing(offloads=True)),
}
DEVICES = (2, 4, 8)


PUBLIC = [
    ("QLoRA, 2 x 2,048 tokens, rank 8, 2 GPUs", QLORA, FSDP2, 2, 2, "35.6 (FSDP 1, Llama-2)"),
    ("the same, offloaded", QLORA, Sharing(offloads=True), 2, 2, "19.6 (FSDP 1, Llama-2)"),
    ("LoRA, 8 x 2,048 tokens, rank 8, 8 GPUs", LORA, FSDP2, 8, 8, "72 to 80 (FSDP 1, Llama-2)"),
]
"""What peft's documentation measured: by way, devices, and examples on each at once."""


def needed(
    what: dict[str, Any], sharing: Sharing, count: int, batch: int = 1, length: int = 512, rank: int | None = None
) -> str:
    """GB of each device, in brackets where it has less."""
    options = {
        "device": "H100",
        "batch_size": batch,
        "max_length": length,
        "rank": rank,
        "gradient_checkpointing": True,
    }
    choice = plan("llama-3-70b", devices=count, sharing=sharing, **options, **what).choices[0]
    size = f"{choice.needed_bytes / 1e9:.0f}"
    return size if choice.fits else f"({size})"


def main() -> None:
    """Fill the page's table."""
    header = ("", *(f"{count} x H100" for count in DEVICES))
    rows = [(way, *(needed(*how, count) for count in DEVICES)) for way, how in WAYS.items()]
    fill(PAGE, "scale", table(header, rows))
    beside = [
        (name, needed(what, how, count, batch, 2048, 8), found) for name, what, how, count, batch, found in PUBLIC
    ]
    fill(PAGE, "public", table(("", "planned, Llama-3", "measured by peft"), beside))


if __name__ == "__main__":
    main()
