"""What was measured as tables: for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from benchmarks.cases import Case, Figure, Side
from benchmarks.runs import Round

SCALES = {"s": 1.0, "ms": 1e3, "GB": 1e-9}
HEADER = ("case", "figure", "peft", "slimtune", "floor", "ratio", "range", "wanted", "reached")
COLUMNS: tuple[Side, ...] = ("peft", "ours", "floor")
COLOURS = {"yes": "green", "no": "red", "": ""}


def values(rounds: list[Round], side: Side, metric: str) -> list[float]:
    return [one[side]["metrics"][metric] for one in rounds if side in one]


def ratios(rounds: list[Round], figure: Figure) -> list[float]:
    """Pair by pair: the two numbers of a pair were taken one right after the other."""
    above, below = (values(rounds, side, figure.metric) for side in figure.ratio)
    return [a / b for a, b in zip(above, below, strict=True)]


def column(figure: Figure, who: Side) -> Side:
    """The side that is shown in a library's column: the one that the ratio names first."""
    return next((side for side in figure.ratio if side.partition("-")[0] == who), who)


def wanted(figure: Figure) -> str:
    """What is wanted of a figure, in words."""
    parts = []
    if figure.at_least is not None:
        parts.append(f">= {figure.at_least:g}")
    if figure.at_most is not None:
        parts.append(f"<= {figure.at_most:g}")
    if figure.ours_below is not None:
        parts.append(f"< {shown(figure.ours_below, figure.unit)}")
    return ", ".join(parts)


def reached(figure: Figure, ratio: float, ours: float) -> str:
    """yes or no; nothing where nothing is wanted."""
    if not wanted(figure):
        return ""
    good = (
        (figure.at_least is None or ratio >= figure.at_least)
        and (figure.at_most is None or ratio <= figure.at_most)
        and (figure.ours_below is None or ours < figure.ours_below)
    )
    return "yes" if good else "no"


def digits(value: float) -> str:
    """Three significant digits: more would be noise."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def shown(value: float, unit: str) -> str:
    return f"{digits(value * SCALES[unit])} {unit}"


def summary(case: Case, rounds: list[Round]) -> Iterator[dict[str, Any]]:
    """One entry a figure: medians, the ratio with its range, and whether what is wanted is reached."""
    for figure in case.figures:
        pairs = ratios(rounds, figure)
        columns = {who: column(figure, who) for who in COLUMNS}
        medians = {
            who: median(values(rounds, side, figure.metric)) for who, side in columns.items() if side in case.sides
        }
        yield {
            "case": case.title,
            "figure": figure.label,
            "unit": figure.unit,
            "medians": medians,
            "ratio": median(pairs),
            "ratio_range": [min(pairs), max(pairs)],
            "wanted": wanted(figure),
            "reached": reached(figure, median(pairs), medians["ours"]),
        }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table as text."""
    numbers = [shown(row["medians"][who], row["unit"]) if who in row["medians"] else "" for who in COLUMNS]
    low, high = row["ratio_range"]
    ratio = f"{row['ratio']:.2f}"
    spread = f"{digits(low)}-{digits(high)}"
    return (row["case"], row["figure"], *numbers, ratio, spread, row["wanted"], row["reached"])


def figures(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The figures of one case for the terminal; narrow enough for 80 columns."""
    floor = any("floor" in row["medians"] for row in rows)
    kept = [number for number, name in enumerate(HEADER) if name != "case" and (floor or name != "floor")]
    found = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number in kept:
        found.add_column(HEADER[number], justify="left" if number == kept[0] else "right", no_wrap=True)
    for row in rows:
        text = cells(row)
        found.add_row(*(text[number] for number in kept), style=COLOURS[row["reached"]])
    return found


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """The same table for a README."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def profile(title: str, found: dict[str, Any]) -> Iterator[Table]:
    """What a profile found: operators by time of their own, and tensors by size."""
    parts = ("forward", "backward", "update")
    seconds = ", ".join(f"{part} {found['metrics'][f'{part}_seconds']:.2f} s" for part in parts)
    yield operators(f"{title}: {seconds}", found["operators"])
    yield operators(f"{title}: by shape", found["shapes"])
    tensors = plain(f"{title}: {found['peak_bytes'] / 1e6:.0f} MB at the peak", "made by", "tensors", "MB")
    for one in found["tensors"]:
        tensors.add_row(escape(one["made"]), str(one["count"]), f"{one['bytes'] / 1e6:.0f}")
    yield tensors


def operators(title: str, events: Iterable[dict[str, Any]]) -> Table:
    """The operators of a profile."""
    found = plain(title, "operator", "calls", "seconds", "share")
    for event in events:
        share = (f"{event['seconds']:.3f}", f"{event['share']:.1%}")
        found.add_row(escape(event["operator"]), str(event["calls"]), *share)
    return found


def plain(title: str, first: str, *numbers: str) -> Table:
    """An empty table: words on the left, numbers to the right of them."""
    found = Table(first, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in numbers:
        found.add_column(name, justify="right", no_wrap=True)
    return found
