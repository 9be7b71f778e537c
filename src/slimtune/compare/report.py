"""The report: one HTML file that needs nothing else, the same as Markdown, and its pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, pvariance
from typing import Any

from slimtune.compare import format as figures
from slimtune.compare import plot
from slimtune.compare.choice import Recommendation, choose
from slimtune.compare.findings import Finding, findings
from slimtune.compare.record import ComparisonRecord
from slimtune.compare.remarks import equal_and_different, not_above_constant
from slimtune.compare.results import RunScore, ShownQuestion
from slimtune.compare.summary import CandidateRow, Summary
from slimtune.console.markdown import code, escaped
from slimtune.console.screen import printable
from slimtune.errors import require
from slimtune.storage.atomic import write_file

PAGE, TABLE, FIGURES = "report.html", "report.md", "report.json"


@dataclass(frozen=True)
class ComparisonReport:
    """All that the page tells."""

    summary: Summary
    facts: ComparisonRecord
    choice: Recommendation
    rows: list[ReportRow]
    findings: list[Finding]
    samples: list[Sample]
    same: list[str]
    different: list[str]
    notes: list[str]

    @property
    def remarks(self) -> list[str]:
        """What a reader must know besides what the runs say."""
        return [*self.facts.remarks, *self.facts.moved]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the choice, every candidate, every pair, the findings and how it was run."""
        return {
            "chosen": self.choice.candidate,
            "headline": self.choice.headline,
            "sentences": list(self.choice.sentences),
            "warnings": list(self.choice.warnings),
            "remarks": self.remarks,
            "scorer": self.summary.scorer,
            "candidates": [row.to_dict() for row in self.summary.rows],
            "pairs": [asdict(pair) | {"shown": pair.is_shown} for pair in self.summary.pairs],
            "findings": [asdict(finding) for finding in self.findings],
            "notes": self.notes,
            "facts": self.facts.model_dump(),
        }


def report(summary: Summary, facts: ComparisonRecord, questions: Sequence[ShownQuestion]) -> ComparisonReport:
    """What follows from the results."""
    same, different = equal_and_different(summary)
    choice = choose(summary)
    choice = replace(choice, warnings=(*choice.warnings, *not_above_constant(summary, facts.constant)))
    notes = [f"{row.name}: {note}" for row in summary.rows for result in row.done for note in result.notes]
    return ComparisonReport(
        summary,
        facts,
        choice,
        table_rows(summary, facts.price_per_hour),
        findings(summary),
        samples(summary, questions),
        same,
        different,
        list(dict.fromkeys(notes)),
    )


def check_dependencies() -> None:
    """See that what the report needs is there, before hours of runs. Raises: MissingDependencyError."""
    require("jinja2", extra="compare", purpose="the report")
    require("matplotlib", extra="compare", purpose="the report")
    require("scipy", extra="compare", purpose="the report")


def html(report: ComparisonReport) -> str:
    """The page; whatever models answered or files are called is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("slimtune.compare", "templates")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # A page is read by programs, too, and at terminals: control characters are shown as they are elsewhere.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    pictures = {"scores": "", "costs": ""}
    if report.summary.scored:
        # Drawn by matplotlib, which escapes what it writes; the names of candidates are all that comes from outside.
        pictures = {"scores": Markup(plot.scores_svg(report.summary)), "costs": Markup(plot.costs_svg(report.summary))}
    domains = {row.name: row.domains for row in report.summary.rows if row.domains}
    values: dict[str, Any] = {"report": report, "pictures": pictures, "domains": domains, "figures": figures}
    return environment.get_template("report.html.j2").render(**values, meaning=MEANING)


def write_report(folder: Path, report: ComparisonReport) -> Path:
    """`report.html`, `report.md`, `report.json` and the pictures, each whole or not at all; the page's path."""
    numbers = json.dumps(report.to_dict(), indent=1) + "\n"
    for name, text in ((PAGE, html(report)), (TABLE, markdown(report)), (FIGURES, numbers)):
        write_file(folder / name, text)
    if report.summary.scored:
        plot.write_pictures(report.summary, folder)
    return folder / PAGE


def markdown(report: ComparisonReport) -> str:
    """The choice, the table, what is known, what was equal and with what it was run."""
    facts, choice = report.facts, report.choice
    head = list(report.rows[0].cells) if report.rows else []
    rows = [[row.row.name, *row.cells.values()] for row in report.rows]
    findings = [
        f"{escaped(f.claim)} ({escaped(f.source)}): **{f.verdict}**. {escaped(f.evidence)}" for f in report.findings
    ]
    sections = {
        f"# {escaped(facts.model)} on {escaped(facts.data)}": "\n\n".join((
            f"**{escaped(choice.headline)}.** {escaped(' '.join(choice.sentences))}",
            *([_bullets(map(escaped, warnings))] if (warnings := [*choice.warnings, *report.remarks]) else []),
            "\n".join(_table_row(cells) for cells in [["", *head], ["---"] * (len(head) + 1), *rows]),
            *(["![scores](scores.png)"] if report.summary.scored else []),
        )),
        "## Known findings": _bullets(findings),
        "## What was equal": _bullets(map(escaped, report.same)),
        "## What was not": _bullets(map(escaped, [*report.different, *report.notes])),
        "## How it was run": _bullets([code(facts.command), *map(escaped, _environment(facts))]),
    }  # fmt: skip
    return "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items() if text) + "\n"


def _environment(facts: ComparisonRecord) -> list[str]:
    named = [", ".join(f"{name} {value}" for name, value in of.items()) for of in (facts.machine, facts.versions)]
    return [facts.date, *named]


def _table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(escaped, cells)) + " |"


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


FIRST, DIVIDED = 3, 3
"""How many questions are shown because they come first, and because the candidates differ on them most."""


@dataclass(frozen=True)
class SampleAnswer:
    """What one candidate or several said alike, and its score."""

    candidates: tuple[str, ...]
    text: str
    score: float


@dataclass(frozen=True)
class Sample:
    """A question with the answers of all candidates."""

    number: int
    question: ShownQuestion
    answers: tuple[SampleAnswer, ...]
    why: str


def samples(summary: Summary, questions: Sequence[ShownQuestion]) -> list[Sample]:
    """The first questions, so that nobody chose them, and those on which the candidates differ most."""
    scored = [(row.name, score) for row in summary.rows if row.done and (score := row.done[0].score)]
    if not scored:
        return []
    count = min(len(questions), len(scored[0][1].per_question))
    first = list(range(min(FIRST, count)))
    divided = sorted(range(len(first), count), key=lambda index: -_apart(summary, index))[:DIVIDED]
    chosen = [(index, "from the start") for index in first]
    chosen += [(index, "the candidates differ") for index in divided if _apart(summary, index) > 0]
    return [Sample(index + 1, questions[index], _answers(scored, index), why) for index, why in chosen]


def _answers(scored: Sequence[tuple[str, RunScore]], index: int) -> tuple[SampleAnswer, ...]:
    """Candidates that said the same stand together, in the order of the first of them."""
    candidates_of: dict[tuple[str, float], list[str]] = {}
    for name, score in scored:
        candidates_of.setdefault((score.answers[index], score.per_question[index]), []).append(name)
    return tuple(SampleAnswer(tuple(names), text, score) for (text, score), names in candidates_of.items())


def _apart(summary: Summary, index: int) -> float:
    """The variance between the candidates' means on one question."""
    return pvariance([fmean(r.score.per_question[index] for r in row.done if r.score) for row in summary.scored])


@dataclass(frozen=True)
class ReportRow:
    """One candidate: its name, and a cell for each column that says something here."""

    row: CandidateRow
    cells: dict[str, str]


SCORE = "score"
INTERVAL = "95% interval"


def table_rows(summary: Summary, price_per_hour: float | None = None) -> list[ReportRow]:
    """The best first, the control and what failed last; a column that is empty in every line is left out."""
    ranked = summary.scored
    rest = [row for row in summary.rows if row not in ranked]
    every = [_cells(summary, row, price_per_hour) for row in (*ranked, *rest)]
    empty = {name for name in every[0] if all(cells[name] in (figures.NONE, "") for cells in every)}
    kept = [{name: value for name, value in cells.items() if name not in empty} for cells in every]
    return [ReportRow(row, cells) for row, cells in zip((*ranked, *rest), kept, strict=True)]


def _cells(summary: Summary, row: CandidateRow, price_per_hour: float | None) -> dict[str, str]:
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


def _against_best(summary: Summary, row: CandidateRow) -> str:
    ranked = summary.scored
    if not ranked or row.score is None:
        return figures.NONE
    if row is ranked[0]:
        return "the best" if len(ranked) > 1 else ""
    pair = summary.pair(ranked[0], row)
    if pair is None:
        return figures.NONE
    return f"p {figures.p_value(pair.adjusted)}" + ("" if pair.is_shown else ", not shown")


def _runs(row: CandidateRow) -> str:
    failed = f", {len(row.failed)} failed" if row.failed else ""
    return f"{len(row.done)} of {row.wanted}{failed}"
