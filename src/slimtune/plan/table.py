"""The classic table: memory by method and size of the model, simulated and as a rule of thumb; bars as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.console.figure import check_picture, new_figure, write
from slimtune.errors import check_choice
from slimtune.methods.lora.config import LoraConfig
from slimtune.plan.devices import Device, find
from slimtune.plan.memory import MemoryBreakdown, MemoryPlan, Precision, Setting
from slimtune.quantization.config import require_for

SIZES = {
    "7B": "llama-2-7b",
    "13B": "llama-2-13b",
    "30B": "llama-30b",
    "70B": "llama-3-70b",
    "110B": "qwen1.5-110b",
}
"""The model of each size, whose configuration comes with the library."""
USUAL_DEVICE = "H100"
"""Whose runtime is counted where no device is named."""


@dataclass(frozen=True)
class TableRow:
    """A method of the table.

    Attributes:
        rule_of_thumb: gigabytes by size, as they are passed around.
        holds: under which settings those figures are right, in a sentence.
    """

    name: str
    rule_of_thumb: tuple[int, ...]
    holds: str
    base: Precision = "dense"
    is_full: bool = False


ROWS = (
    TableRow(
        "Full, 16-bit",
        (67, 125, 288, 672, 1056),
        "9.6 bytes a parameter: weights, gradients and both of Adam's moments all in 16 bits (8 bytes), and a fifth on "
        "top. Updates below 1/256 of a weight are lost then; with float32 weights and moments, as `slimtune train "
        "--method full` has them, it is 16 bytes and more.",
        is_full=True,
    ),
    TableRow(
        "LoRA, 16-bit",
        (15, 28, 63, 146, 229),
        "2.1 bytes a parameter: the weights, and a twentieth for adapter and activations: one short example at a time "
        "with checkpointing.",
    ),
    TableRow(
        "QLoRA, 8-bit",
        (9, 17, 38, 88, 138),
        "1.25 bytes a parameter: int8 weights and a quarter on top.",
        base="int8",
    ),
    TableRow(
        "QLoRA, 4-bit",
        (5, 9, 20, 46, 72),
        "0.65 bytes a parameter: NF4 with its scales (0.52), embeddings and head left in 16 bits, and a little on top.",
        base="nf4",
    ),
)


@dataclass(frozen=True)
class TableCell:
    """One method on one model."""

    row: TableRow
    size: str
    plan: MemoryPlan
    rule_of_thumb_gb: int
    device: Device

    @property
    def needed_bytes(self) -> int:
        """The simulated peak with the runtime of the device, as `plan` counts it."""
        return self.device.needed_bytes(self.plan.peak_bytes)

    @property
    def gigabytes(self) -> float:
        """What is needed, in GB of 10^9 bytes."""
        return self.needed_bytes / 1e9

    @property
    def ratio(self) -> float:
        """Simulated against the rule of thumb."""
        return self.gigabytes / self.rule_of_thumb_gb

    def to_dict(self) -> dict[str, Any]:
        """For JSON; bytes, and the rule of thumb in gigabytes."""
        return {
            "method": self.row.name, "size": self.size, "model": SIZES[self.size], "peak_bytes": self.plan.peak_bytes,
            "needed_bytes": self.needed_bytes, "parts": self.plan.peak.parts.named(),
            "rule_of_thumb_gb": self.rule_of_thumb_gb, "holds": self.row.holds,
        }  # fmt: skip


def setting(row: TableRow, batch: int = 1, sequence: int = 512, rank: int = 16, checkpointing: bool = True) -> Setting:
    """How a row is simulated: bf16, one example of 512 tokens, checkpointing, LoRA on all linear layers."""
    return Setting(
        method=None if row.is_full else LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM"),
        base=row.base,
        batch=batch,
        sequence=sequence,
        padded=False,
        gradient_checkpointing=checkpointing,
        task_type="CAUSAL_LM",
    )


def classic_table(
    simulate: Callable[[str, Setting], MemoryPlan],
    sizes: Sequence[str] = tuple(SIZES),
    batch: int = 1,
    sequence: int = 512,
    rank: int = 16,
    checkpointing: bool = True,
    device: Device | None = None,
) -> list[TableCell]:
    """All cells, row by row.

    Args:
        simulate: a plan for a model's name and a setting.
        device: whose runtime is counted; None for a usual one of data centres.

    Raises:
        ConfigError: an unknown size, or settings that can't be.
        MissingDependencyError: a library that quantizes isn't installed.
    """
    for size in sizes:
        check_choice("size", size, tuple(SIZES))
    for row in ROWS:
        require_for(row.base)
    device = device or find(USUAL_DEVICE)
    cells = []
    # One simulation a cell: 4 methods by 5 sizes, about a second each.
    for row in ROWS:
        for size, figure in zip(SIZES, row.rule_of_thumb, strict=True):
            if size in sizes:
                plan = simulate(SIZES[size], setting(row, batch, sequence, rank, checkpointing))
                cells.append(TableCell(row, size, plan, figure, device))
    return cells


COLOURS = {
    "weights": "#4c72b0",
    "adapter": "#dd8452",
    "gradients": "#55a868",
    "optimizer": "#c44e52",
    "activations": "#8172b3",
    "loss": "#937860",
    "workspace": "#8c8c8c",
    "runtime": "#c9c9c9",
}
"""Of each part, on paper and on the screen."""


@dataclass(frozen=True)
class Bar:
    """One line of the picture."""

    label: str
    parts: MemoryBreakdown
    runtime_bytes: int = 0
    rule_of_thumb_bytes: float | None = None


def plot_bars(bars: Sequence[Bar], picture: Path, title: str, limit_bytes: float | None = None) -> None:
    """Draw a bar for each of `bars`, cut into its parts, with the device's memory as a line.

    Raises:
        ConfigError: another format than PNG or SVG.
        MissingDependencyError: matplotlib is not installed.
    """
    check_picture(picture)
    figure = new_figure(9, 1.2 + 0.34 * len(bars))
    axes = figure.add_subplot(xlabel="GB", title=title)
    rows = range(len(bars))
    left = [0.0] * len(bars)
    for part, colour in COLOURS.items():
        widths = [(bar.parts.named() | {"runtime": bar.runtime_bytes})[part] / 1e9 for bar in bars]
        axes.barh(rows, widths, left=left, color=colour, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    rules = [(row, bar.rule_of_thumb_bytes / 1e9) for row, bar in enumerate(bars) if bar.rule_of_thumb_bytes]
    if rules:
        axes.plot([x for _, x in rules], [row for row, _ in rules], "k|", markersize=12, label="rule of thumb")
    if limit_bytes is not None:
        axes.axvline(limit_bytes / 1e9, color="black", linestyle="--", label="the device")
    axes.set_yticks(list(rows), [bar.label for bar in bars])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    write(figure, picture)


def classic_bars(cells: Sequence[TableCell]) -> list[Bar]:
    """The classic table's cells with their rules of thumb."""
    return [
        Bar(
            f"{cell.row.name}, {cell.size}",
            cell.plan.peak.parts,
            cell.needed_bytes - cell.plan.peak_bytes,
            cell.rule_of_thumb_gb * 1e9,
        )
        for cell in cells
    ]
