"""The report as Markdown, for a README or a pull request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimtune.compare.page import Report


def markdown(told: Report) -> str:
    """The choice, the table, what is known, what was equal and with what it was run."""
    facts = told.facts
    head = list(told.lines[0].cells) if told.lines else []
    rows = [[line.row.name, *line.cells.values()] for line in told.lines]
    sections = [
        f"# {facts.model} on {facts.data}",
        f"**{_plain(told.choice.headline)}.** {_plain(' '.join(told.choice.sentences))}",
        _bullets([*told.choice.warnings, *told.remarks]),
        _table(["", *head], rows),
        "![scores](scores.png)" if told.summary.scored else "",
        "## Known findings\n\n"
        + _bullets(f"{f.claim} ({f.source}): **{f.verdict}**. {f.evidence}" for f in told.findings)
        if told.findings
        else "",
        "## What was equal\n\n" + _bullets(told.same),
        "## What was not\n\n" + _bullets([*told.different, *told.notes]) if told.different or told.notes else "",
        "## How it was run\n\n" + _bullets(_how(told)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _how(told: Report) -> list[str]:
    facts = told.facts
    machine = ", ".join(f"{name} {value}" for name, value in facts.machine.items())
    versions = ", ".join(f"{name} {value}" for name, value in facts.versions.items())
    return [f"`{facts.command}`", facts.date, machine, versions]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(_row(cells) for cells in [head, ["---"] * len(head), *rows])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {_plain(item)}" for item in items)


def _plain(text: str) -> str:
    """Text that holds no line break, bar or tag of its own."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
