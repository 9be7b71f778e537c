"""The rows of the summary as cells of text: one table for the page, for Markdown and for the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from slimtune.compare import figures
from slimtune.compare.summary import Row, Summary


@dataclass(frozen=True)
class Line:
    """One arm: its name, and a cell for each column that says something here."""

    row: Row
    cells: dict[str, str]


SCORE = "score"
INTERVAL = "95% interval"


def lines(summary: Summary, price_per_hour: float | None = None) -> list[Line]:
    """The best first, the control and what failed last; a column that is empty in every line is left out."""
    ranked = summary.scored
    rest = [row for row in summary.rows if row not in ranked]
    every = [_cells(summary, row, price_per_hour) for row in (*ranked, *rest)]
    empty = {name for name in every[0] if all(cells[name] in (figures.NONE, "") for cells in every)}
    kept = [{name: value for name, value in cells.items() if name not in empty} for cells in every]
    return [Line(row, cells) for row, cells in zip((*ranked, *rest), kept, strict=True)]


def _cells(summary: Summary, row: Row, price_per_hour: float | None) -> dict[str, str]:
    interval = f"{figures.score(row.score.low)} to {figures.score(row.score.high)}" if row.score else figures.NONE
    seconds = row.train_seconds
    return {
        SCORE: figures.score(row.score.mean if row.score else None),
        INTERVAL: interval,
        "against the best": _against_best(summary, row),
        "forgotten": figures.change(row.forgotten),
        "intruders per matrix": figures.ratio(row.intruders),
        "memory": figures.size(row.peak_bytes),
        "time": figures.duration(seconds),
        "cost": figures.money(None if price_per_hour is None or seconds is None else price_per_hour * seconds / 3600),
        "trained": figures.count(row.trainable),
        "on disk": figures.size(row.size_bytes),
        "per answer": figures.duration(row.answer_seconds),
        "runs": _runs(row),
    }


MEANING = {
    SCORE: "mean over seeds and questions",
    INTERVAL: "of that mean, for other seeds and other questions",
    "against the best": "p of no difference, corrected for all pairs (Holm)",
    "forgotten": "rise of the loss on text outside of the task, in nats per token; above 0 is worse than before",
    "intruders per matrix": "leading directions of a tuned matrix that none of the base's resemble",
    "memory": "peak of the training process",
    "time": "of training, loading not counted",
    "cost": "of the time to train, at the machine's price by the hour",
    "trained": "parameters",
    "on disk": "weights that are written",
    "per answer": "in batches, loading not counted",
    "runs": "done of those that were asked for",
}
"""What each column says."""


def _against_best(summary: Summary, row: Row) -> str:
    ranked = summary.scored
    if not ranked or row.score is None:
        return figures.NONE
    if row is ranked[0]:
        return "the best" if len(ranked) > 1 else ""
    pair = summary.pair(ranked[0], row)
    if pair is None:
        return figures.NONE
    return f"p {figures.p_value(pair.adjusted)}" + ("" if pair.is_shown else ", not shown")


def _runs(row: Row) -> str:
    failed = f", {len(row.failed)} failed" if row.failed else ""
    return f"{len(row.done)} of {row.wanted}{failed}"
