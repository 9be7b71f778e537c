"""The report: one HTML file that needs nothing else, the same as Markdown, and its pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from slimtune.compare import figures, plot
from slimtune.compare.budget import equal_and_not
from slimtune.compare.choice import Choice, choose
from slimtune.compare.facts import Facts
from slimtune.compare.findings import Finding, findings
from slimtune.compare.markdown import markdown
from slimtune.compare.remarks import beside_constant
from slimtune.compare.results import Question
from slimtune.compare.samples import Sample, samples
from slimtune.compare.summary import Summary
from slimtune.compare.table import MEANING, Line, lines
from slimtune.errors import MissingDependencyError
from slimtune.staging import staged_file

PAGE, TABLE, FIGURES = "report.html", "report.md", "report.json"


@dataclass(frozen=True)
class Report:
    """All that the page tells."""

    summary: Summary
    facts: Facts
    choice: Choice
    lines: list[Line]
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
        """For JSON: the choice, every arm, every pair, the findings and how it was run."""
        return {
            "chosen": self.choice.arm,
            "headline": self.choice.headline,
            "sentences": list(self.choice.sentences),
            "warnings": list(self.choice.warnings),
            "remarks": self.remarks,
            "scorer": self.summary.scorer,
            "arms": [row.to_dict() for row in self.summary.rows],
            "pairs": [asdict(pair) | {"shown": pair.is_shown} for pair in self.summary.pairs],
            "findings": [asdict(finding) for finding in self.findings],
            "notes": self.notes,
            "facts": self.facts.model_dump(),
        }


def report(summary: Summary, facts: Facts, questions: Sequence[Question]) -> Report:
    """What follows from the results."""
    same, different = equal_and_not(summary)
    choice = choose(summary)
    choice = replace(choice, warnings=(*choice.warnings, *beside_constant(summary, facts.constant)))
    notes = [f"{row.name}: {note}" for row in summary.rows for result in row.done for note in result.notes]
    return Report(
        summary,
        facts,
        choice,
        lines(summary, facts.price_per_hour),
        findings(summary),
        samples(summary, questions),
        same,
        different,
        list(dict.fromkeys(notes)),
    )


def html(told: Report) -> str:
    """The page; whatever models answered or files are called is escaped."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise MissingDependencyError("the report needs jinja2: run `pip install 'slimtune[compare]'`") from error
    from markupsafe import Markup

    loader = PackageLoader("slimtune.compare", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pictures = {"scores": "", "costs": ""}
    if told.summary.scored:
        # Drawn by matplotlib, which escapes what it writes; the names of arms are all that comes from outside.
        pictures = {"scores": Markup(plot.scores_svg(told.summary)), "costs": Markup(plot.costs_svg(told.summary))}
    domains = {row.name: row.domains for row in told.summary.rows if row.domains}
    values: dict[str, Any] = {"told": told, "pictures": pictures, "domains": domains, "figures": figures}
    return environment.get_template("report.html.j2").render(**values, meaning=MEANING)


def write_report(folder: Path, told: Report) -> Path:
    """`report.html`, `report.md`, `report.json` and the pictures, each whole or not at all; the page's path."""
    numbers = json.dumps(told.to_dict(), indent=1) + "\n"
    for name, text in ((PAGE, html(told)), (TABLE, markdown(told)), (FIGURES, numbers)):
        with staged_file(folder / name) as scratch:
            scratch.write_text(text, encoding="utf-8")
    if told.summary.scored:
        plot.write_pictures(told.summary, folder)
    return folder / PAGE
