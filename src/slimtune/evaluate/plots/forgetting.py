"""The change of the language loss by domain, with its intervals."""

from __future__ import annotations

from pathlib import Path

from slimtune.evaluate.forgetting import Forgetting, Interval
from slimtune.picture import new_figure, write


def plot_forgetting(found: Forgetting, picture: Path, title: str) -> None:
    """Draw the difference of each domain as a point on its interval, and the mean below.

    Raises:
        ConfigError: another format than PNG or SVG.
        MissingDependencyError: matplotlib is not installed.
    """
    rows = [(name, change.difference, change.interval) for name, change in found.domains.items()]
    rows.append(("mean", found.difference, found.interval))
    figure = new_figure(7, 1.4 + 0.42 * len(rows))
    axes = figure.add_subplot(xlabel="loss after - before, nats per token (above 0: forgotten)", title=title)
    for place, (name, difference, interval) in enumerate(rows):
        colour = "black" if name == "mean" else "tab:red" if _rose(interval) else "tab:blue"
        if interval:
            axes.plot(interval, (place, place), color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(difference, place, "D" if name == "mean" else "o", color=colour)
    axes.axvline(0, color="gray", linewidth=1)
    axes.axhline(len(rows) - 1.5, color="gray", linewidth=0.5, linestyle=":")
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    write(figure, picture)


def _rose(interval: Interval) -> bool:
    return interval is not None and interval[0] > 0
