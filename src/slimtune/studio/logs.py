"""What a run writes line by line: losses and samples, read from where a page stopped reading."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOSSES, SAMPLES, PROGRESS = "loss.jsonl", "samples.jsonl", "progress.json"
CURVES = ("loss", "eval_loss")
MAX_POINTS = 1000
"""Of a curve, which is more than a screen has columns for it."""


@dataclass(frozen=True)
class Lines:
    """Lines of JSON from a file, and where the next ones begin."""

    entries: list[dict[str, Any]]
    offset: int


def read_lines(path: Path, offset: int = 0) -> Lines:
    """The whole lines behind an offset; none where there is no file. What isn't a mapping is passed over.

    A file that is shorter than the offset was begun anew and is read from its beginning.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size < offset:
                offset = 0
            file.seek(offset)
            data = file.read()
    except OSError:
        return Lines([], 0)
    # The last line may be in the middle of being written.
    whole = data[: data.rfind(b"\n") + 1]
    entries = []
    for line in whole.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            # A kill came in the middle of this line, or the file is damaged.
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return Lines(entries, offset + len(whole))


def curves(entries: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The points of each curve that is there, in the order of steps."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in entries:
        for name in CURVES:
            step, value = entry.get("step"), entry.get(name)
            # JSON as Python reads it has NaN, and a chart has no place for it.
            if isinstance(step, int) and isinstance(value, int | float) and value == value:
                found.setdefault(name, []).append((step, float(value)))
    return {name: thinned(points) for name, points in found.items()}


def thinned(points: list[tuple[int, float]], most: int = MAX_POINTS) -> list[tuple[int, float]]:
    """At most so many points: the mean of neighbours, and the last point as it is."""
    size = -(-len(points) // most)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
    return [*means[:-1], points[-1]]


def series(label: str, points: Iterable[tuple[int, float]], marks: bool = False) -> dict[str, Any]:
    """A line of a chart, as `chart.js` takes it; `marks` shows its points."""
    points = list(points)
    return {"label": label, "x": [step for step, _ in points], "y": [value for _, value in points], "points": marks}
