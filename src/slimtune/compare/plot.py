"""The pictures of the page: scores with their intervals, and what a score costs."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.compare.summary import CandidateRow, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""A colour that nothing else has: on the page it becomes that of the text, light or dark."""
PAPER = "#222222"
WIDTH = 4.6
"""Inches: about as many points as a phone has pixels, so that text keeps its size there."""
LEGEND = 54
"""Characters that fit in a line of the width."""
COLOURS = ("#4c78a8", "#e07b39", "#3f9b6c", "#c8504f", "#8a6fb5", "#9a7b63", "#c870a8", "#7f7f7f", "#b5a12f", "#3aa5b5")


def scores_svg(summary: Summary) -> str:
    """Each candidate's mean, interval and seeds, the best on top, as SVG for the page."""
    return _svg(lambda: draw_scores(summary, INK), "scores")


def costs_svg(summary: Summary) -> str:
    """Score against memory and time of the training, as SVG for the page; empty if nothing was trained."""
    return _svg(lambda: draw_costs(summary, INK), "costs") if _trained(summary) else ""


def write_pictures(summary: Summary, folder: Path) -> list[Path]:
    """`scores.png` and `costs.png`, for a README."""
    drawn = {"scores.png": draw_scores}
    if _trained(summary):
        drawn["costs.png"] = draw_costs
    for name, draw in drawn.items():
        with _style():
            draw(summary, PAPER).savefig(folder / name, dpi=150, facecolor="white")
    return [folder / name for name in drawn]


def draw_scores(summary: Summary, ink: str) -> Figure:
    """One line a candidate."""
    rows = [*summary.scored, *([summary.control] if summary.control else [])]
    figure, axes = _axes(1, (WIDTH, 0.8 + 0.34 * len(rows)), ink)
    for place, row in enumerate(rows):
        assert row.score
        colour = _colour(summary, row)
        axes[0].plot([row.score.low, row.score.high], [place, place], color=colour, linewidth=3, solid_capstyle="round")
        seeds = [result.score.mean for result in row.done if result.score]
        axes[0].plot(seeds, [place] * len(seeds), "|", color=ink, markersize=8, markeredgewidth=1)
        axes[0].plot([row.mean], [place], "o", color=colour, markersize=7)
    axes[0].set_yticks(range(len(rows)), [row.name for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    axes[0].set_xlabel(_score_label(summary))
    axes[0].grid(axis="x", alpha=0.25, color=ink)
    return figure


def draw_costs(summary: Summary, ink: str) -> Figure:
    """Two panels under one legend, for neighbours score alike; what needs no training is a dashed line."""
    figure, axes = _axes(2, (WIDTH, 6.2), ink)
    _cost_panel(axes[0], summary, "memory to train (GB)", lambda row: (row.peak_bytes or 0) / 1e9, ink)
    _cost_panel(axes[1], summary, "time to train (s)", lambda row: row.train_seconds or 0, ink)
    columns = max(1, LEGEND // (4 + max(len(row.name) for row in _trained(summary))))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns, frameon=False,
                  labelcolor=ink, handletextpad=0.2)  # fmt: skip
    return figure


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, score) that no other beats in both: Pareto's front, by cost."""
    best: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or value > best[-1][1]:
            best.append((cost, value))
    return best


def _cost_panel(axes: Axes, summary: Summary, label: str, cost: Callable[[CandidateRow], float], ink: str) -> None:
    trained = _trained(summary)
    points = [(cost(row), summary.sign * row.mean) for row in trained]
    edge = front(points)
    axes.plot([x for x, _ in edge], [summary.sign * y for _, y in edge], color=ink, alpha=0.35, linewidth=1, zorder=1)
    for row in trained:
        assert row.score
        x, colour = cost(row), _colour(summary, row)
        axes.plot([x, x], [row.score.low, row.score.high], color=colour, linewidth=2, solid_capstyle="round")
        axes.plot([x], [row.mean], "o", color=colour, markersize=7, label=row.name)
    _untrained(axes, summary, ink)
    axes.set_xlim(0, 1.1 * max(x for x, _ in points) or 1)
    axes.set_xlabel(label)
    axes.set_ylabel(_score_label(summary))
    axes.grid(alpha=0.2, color=ink)


def _untrained(axes: Axes, summary: Summary, ink: str) -> None:
    """What needs no training as dashed lines; only named where it is so far off that the rest would shrink to a dot."""
    ends = [end for row in _trained(summary) if row.score for end in (row.score.low, row.score.high)]
    low, high = min(ends), max(ends)
    room = max(high - low, 1e-3)
    far, levels = [], {}
    for row in summary.scored:
        if row.candidate.is_trained:
            continue
        if low - room <= row.mean <= high + room:
            levels.setdefault(round((row.mean - low) / room, 1), []).append(row)
        else:
            far.append(f"{row.name} {row.mean:.3f}")
    for alike in levels.values():
        for row in alike:
            axes.axhline(row.mean, color=ink, linestyle="--", linewidth=1, alpha=0.45)
        # Names at one height would lie on top of each other.
        axes.annotate(", ".join(row.name for row in alike), (1, alike[0].mean), xycoords=("axes fraction", "data"),
                      xytext=(-3, 2), textcoords="offset points", ha="right", color=ink)  # fmt: skip
    shown = [row.mean for row in summary.scored if low - room <= row.mean <= high + room]
    top = max([high, *shown]) + 0.35 * room
    # There is no share above one.
    axes.set_ylim(min([low, *shown]) - 0.25 * room, min(top, 1.005) if low >= 0 and high <= 1 else top)
    if far:
        axes.annotate(f"off the scale: {', '.join(far)}", (0.01, 0.02), xycoords="axes fraction", fontsize=9,
                      color=ink, alpha=0.8)  # fmt: skip


def _trained(summary: Summary) -> list[CandidateRow]:
    return [row for row in summary.scored if row.candidate.is_trained and row.peak_bytes is not None]


def _score_label(summary: Summary) -> str:
    return summary.scorer + ("" if summary.higher_is_better else " (less is better)")


def _colour(summary: Summary, row: CandidateRow) -> str:
    return COLOURS[[other.name for other in summary.rows].index(row.name) % len(COLOURS)]


def _axes(count: int, inches: tuple[float, float], ink: str) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    figure.patch.set_alpha(0)
    panels = [figure.add_subplot(count, 1, number + 1) for number in range(count)]
    for axes in panels:
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(ink)
        axes.tick_params(colors=ink, labelsize=10)
        axes.xaxis.label.set_color(ink)
        axes.yaxis.label.set_color(ink)
    return figure, panels


def _style(**more: Any) -> Any:
    import matplotlib

    settings: Any = {"font.size": 10, **more}
    return matplotlib.rc_context(settings)


def _svg(draw: Callable[[], Figure], name: str) -> str:
    """Text stays text, and nothing in it depends on the day: the same results give the same page."""
    written = io.StringIO()
    with _style(**{"svg.fonttype": "none", "svg.hashsalt": name}):
        draw().savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = written.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # Two pictures on one page would share these names.
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*pt"([^>]*?) (?:width|height)="[^"]*pt"', r"\1\2", text, count=1)
