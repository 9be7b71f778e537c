"""Memory by its parts as a picture, PNG or SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slimtune.console.figure import check_picture, new_figure, write
from slimtune.plan.memory import Parts
from slimtune.plan.table import Cell

COLOURS = {
    "weights": "#4c72b0",
    "adapter": "#dd8452",
    "gradients": "#55a868",
    "optimizer": "#c44e52",
    "activations": "#8172b3",
    "loss": "#937860",
    "workspace": "#8c8c8c",
}
"""Of each part, on paper and on the screen."""


@dataclass(frozen=True)
class Bar:
    """One line of the picture."""

    label: str
    parts: Parts
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
        widths = [getattr(bar.parts, part) / 1e9 for bar in bars]
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


def classic_bars(cells: Sequence[Cell]) -> list[Bar]:
    """The classic table's cells with their rules of thumb."""
    return [Bar(f"{cell.row.name}, {cell.size}", cell.plan.peak.parts, cell.rule_of_thumb_gb * 1e9) for cell in cells]
