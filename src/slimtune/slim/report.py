"""The report of a pipeline: a row a step, as HTML, Markdown, JSON and a picture."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.compare import format as figures
from slimtune.console.figure import new_figure, write
from slimtune.console.screen import one_line
from slimtune.slim.measure import SlimRow
from slimtune.storage.atomic import write_file

PAGE, TABLE, NUMBERS, PICTURE = "slim_report.html", "slim_report.md", "slim_report.json", "slim_report.png"
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "table{border-collapse:collapse}th,td{padding:.4rem .6rem;border-bottom:1px solid #8884;text-align:right}"
    "th:first-child{text-align:left}"
)
MEANING = (
    "Speeds are in tokens a second, in brackets against the first row in turns; resident is the whole process after "
    "one answer; KL, equal first choices and forgetting are against the first row, on texts that ship with the "
    "package; zeros are those in the layers of the blocks, which make neither the file smaller nor the model faster. "
    "A folder is read by slimtune and transformers where they loaded it and gave the same answers."
)


@dataclass(frozen=True)
class SlimReport:
    """The rows of a pipeline, the untouched model first."""

    model: str
    rows: list[SlimRow]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {"model": self.model, "rows": [row.to_dict() for row in self.rows]}


def table(report: SlimReport) -> list[dict[str, str]]:
    """The cells of each row by column."""
    return [_cells(row) for row in report.rows]


def _cells(row: SlimRow) -> dict[str, str]:
    interval = f" ({row.interval[0]:.3f} to {row.interval[1]:.3f})" if row.interval else ""
    return {
        "step": row.name,
        "file": figures.size(row.bytes),
        "resident": figures.size(row.resident_bytes),
        "decode": f"{row.decode_speed:.1f} ({row.decode_ratio:.2f}x)",
        "prefill": f"{row.prefill_speed:.0f} ({row.prefill_ratio:.2f}x)",
        "perplexity": f"{row.perplexity:.2f}",
        "score": figures.score(row.score) + interval,
        "KL": f"{row.kl:.4f}",
        "same first": f"{row.same_first:.1%}",
        "forgotten": figures.change(row.forgetting),
        "zeros": f"{row.sparsity:.1%}",
        "read by": ", ".join(row.engines),
        "time": figures.duration(row.seconds),
    }


def markdown(report: SlimReport) -> str:
    """The table as Markdown."""
    rows = table(report)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"# {one_line(report.model)}, made smaller\n\n{text}\n\n{MEANING}\n\n![size and quality]({PICTURE})\n"


def page(report: SlimReport) -> str:
    """The table as a page that needs nothing else; what a model is called is escaped."""
    rows, title = table(report), html.escape(one_line(report.model))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join(_row(list(row.values())) for row in rows)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}, made smaller</title>'
        f"<style>{STYLE}</style><h1>{title}, made smaller</h1>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{html.escape(MEANING)}</p></html>\n"
    )


def _row(cells: list[str]) -> str:
    name, *others = map(html.escape, cells)
    return f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in others)}</tr>"


def write_report(folder: Path, report: SlimReport) -> None:
    """Write the report's four files."""
    write_file(folder / NUMBERS, json.dumps(report.to_dict(), indent=1) + "\n")
    write_file(folder / TABLE, markdown(report))
    write_file(folder / PAGE, page(report))
    figure = new_figure(6, 3.5)
    axes = figure.subplots()
    axes.plot([row.bytes / 1e6 for row in report.rows], [row.perplexity for row in report.rows], "o-")
    for row in report.rows:
        axes.annotate(row.name, (row.bytes / 1e6, row.perplexity), textcoords="offset points", xytext=(5, 5))
    axes.set_xlabel("weights on disk, MB")
    axes.set_ylabel("perplexity")
    write(figure, folder / PICTURE)
