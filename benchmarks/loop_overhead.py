"""What `slimtune train` costs a step beyond the bare step: the command.

Both sides take turns, each time in a fresh process; the ratio is taken turn by turn and its median is shown.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import machine
from benchmarks.cases import Work
from benchmarks.runs import MeasurementError, run_module

AT_MOST = 1.05
SIDES = ("bare", "fine_tune")
METRICS = ("step_seconds", "processor_seconds")
"""Processor time is what is left to compare by on a machine that others use."""
Turn = dict[str, dict[str, float]]
"""What each side reported."""
EXAMPLES = """
Examples:

    python -m benchmarks.loop_overhead                      SmolLM2, 4 x 256 tokens, five turns

    python -m benchmarks.loop_overhead --steps 4 --turns 1  does it run?
"""

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
console = Console()


def turn(work: Work, folder: str) -> Turn:
    """What a step of each side took; raises MeasurementError if they did not do the same."""
    found: Turn = {}
    for side in SIDES:
        given = {"work": asdict(work), "side": side, "folder": folder}
        found[side] = run_module("benchmarks.loop_worker", json.dumps(given))
    losses = [found[side]["loss"] for side in SIDES]
    if abs(losses[0] - losses[1]) > 0.02 * losses[0]:
        raise MeasurementError(f"the two did not do the same: the last losses are {losses}")
    return found


def shown(turns: list[Turn]) -> Table:
    """All turns, and the medians."""
    table = Table("turn", *(f"{side}, s" for side in SIDES), "ratio", "ratio of processor time")
    for number, one in enumerate(turns, 1):
        seconds = [f"{one[side]['step_seconds']:.3f}" for side in SIDES]
        table.add_row(str(number), *seconds, *(f"{ratio([one], metric):.3f}" for metric in METRICS))
    middle = [median(one[side]["step_seconds"] for one in turns) for side in SIDES]
    ratios = (f"{ratio(turns, metric):.3f}" for metric in METRICS)
    table.add_row("median", *(f"{value:.3f}" for value in middle), *ratios, style="bold")
    return table


def ratio(turns: list[Turn], metric: str = "step_seconds") -> float:
    """The median of the turns' ratios."""
    return median(one["fine_tune"][metric] / one["bare"][metric] for one in turns)


@app.command(epilog=EXAMPLES)
def main(
    turns: Annotated[int, typer.Option(min=1, help="How often both sides measure.")] = 5,
    steps: Annotated[int, typer.Option(min=4, help="Steps of a turn; the first is thrown away.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 4,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a row.")] = 256,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where.")] = "cpu",
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write the results.")] = None,
) -> None:
    """Measure the step of `slimtune train` beside the bare step, LoRA on SmolLM2-135M in bf16."""
    work = Work(batch=batch, length=length, steps=steps, device=device)
    load = machine.load()
    if load > machine.BUSY_SHARE * machine.cores():
        console.print(f"[yellow]The machine is busy (load {load:.1f}): the times will be noisy.")
    with tempfile.TemporaryDirectory() as scratch, console.status("Measuring"):
        folder = run_module("benchmarks.prepare", "", f"{scratch}/adapter")["folder"]
        try:
            done = [turn(work, folder) for _ in range(turns)]
        except MeasurementError as error:
            console.print(f"[red]{escape(str(error))}", highlight=False)
            raise typer.Exit(1) from None
    console.print(shown(done))
    console.print(f"a step of slimtune train takes {ratio(done):.3f} of the bare one; wanted: at most {AT_MOST}")
    if json_path is not None:
        json_path.write_text(json.dumps({"work": asdict(work), "load_before": load, "turns": done}, indent=2))
    raise typer.Exit(0 if ratio(done) <= AT_MOST else 1)


if __name__ == "__main__":
    app()
