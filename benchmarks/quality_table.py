"""The runs on quantized bases as the table of `docs/figures/quantized.md`, beside LoRA in bf16."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks import page
from benchmarks.method_cases import METHODS, ON_QUANTIZED, TASKS, Method
from benchmarks.method_table import Run, runs_of, shown_score, timed
from benchmarks.results import subtitle

HEADER = ("method and base", "bits per weight", "score", "last loss", "step", "memory")
TASK = TASKS["orders"]
BASELINE = METHODS[0]


def row(runs: dict[int, Run], method: Method) -> tuple[str, ...]:
    def middle(metric: str, of: dict[int, Run] = runs) -> float:
        return median(run[metric] for run in of.values())

    return (
        method.name if method.quantize else f"{method.name}-bf16",
        f"{middle('bits_per_weight'):.2f}" if method.quantize else "16.00",
        shown_score(runs),
        f"{middle('last_loss'):.3f}",
        f"{1e3 * middle('step_seconds', timed(runs)):.0f} ms" if timed(runs) else "",
        f"{middle('peak_above_imports_bytes') / 1e9:.2f} GB",
    )


def write(document: dict[str, Any]) -> None:
    """Put the table between the page's marks, once there is a run on a quantized base."""
    found = [(method, runs_of(document["runs"], TASK, method, "ours")) for method in (BASELINE, *ON_QUANTIZED)]
    measured = [(method, runs) for method, runs in found if runs]
    if not any(method.quantize for method, _ in measured):
        return
    dates = sorted({run["date"] for _, runs in measured for run in runs.values()})
    note = (
        f"{TASK.steps} steps of {TASK.batch}; score: {TASK.score} on {TASK.held_out} held-out examples, mean and 95 % "
        f"interval over seeds. {subtitle(document['machine'])} {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )
    table = page.table(HEADER, [row(runs, method) for method, runs in measured])
    page.fill(page.QUANTIZED, "quality", f"{table}\n\n{note}")
