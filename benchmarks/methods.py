"""Every method on two real tasks, beside peft's: score, parameters, time, memory, size.

Each run is a process of its own. peft and slimtune take turns seed by seed, on the same batches; the adapter that is
scored is the one on disk, read again by slimtune on a fresh base. What was measured is on disk before the next run
starts, so that a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import machine, method_table, quality_table
from benchmarks.lora import warn_if_busy
from benchmarks.method_cases import METHODS, ON_QUANTIZED, TASKS, Method, Side, Task, settings_of
from benchmarks.results import FOLDER
from benchmarks.runs import MeasurementError, run_module

EXAMPLES = """
Examples:

    python -m benchmarks.methods                                   all methods, both tasks, three seeds

    python -m benchmarks.methods --method dora --seeds 1           one method once

    python -m benchmarks.methods --quantized                       LoRA in bf16 and on quantized bases, on the orders

    python -m benchmarks.methods --busy                            other work runs beside: keep scores, not times

    python -m benchmarks.methods --table                           only write the pages and the plot anew
"""

Run = dict[str, Any]
app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
console = Console()


class Kept:
    """The runs on disk, by task, method, side and seed; those of other settings are measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": {}}

    def has(self, key: str, settings: dict[str, Any]) -> bool:
        return self.document["runs"].get(key, {}).get("settings") == settings

    def add(self, key: str, run: Run) -> None:
        self.document["runs"][key] = run
        self.document["machine"] = machine.describe(run.pop("torch"))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        pending = self.path.with_suffix(".new")
        pending.write_text(json.dumps(self.document, indent=1, sort_keys=True) + "\n")
        pending.replace(self.path)


def key_of(task: Task, method: Method, side: Side, seed: int) -> str:
    return f"{task.name}/{method.name}/{side}/{seed}"


def planned(
    tasks: Sequence[Task], methods: Sequence[Method], seeds: Iterable[int]
) -> list[tuple[Task, Method, Side, int]]:
    """All runs, seed by seed, the two sides of a method one after the other."""
    return [
        (task, method, side, seed)
        for seed in seeds
        for task in tasks
        for method in methods
        for side in (("peft", "ours") if method.in_peft else ("ours",))
    ]


def measure(task: Task, method: Method, side: Side, seed: int, folder: str) -> Run:
    specification = {"task": task.name, "method": method.name, "side": side, "seed": seed, "folder": folder}
    load = machine.load()
    began = time.monotonic()
    run = run_module("benchmarks.method_worker", json.dumps(specification))
    about = {"date": machine.today(), "commit": machine.commit(), "load_before": load}
    return {**run, **about, "seconds": time.monotonic() - began, "settings": settings_of(task, method)}


def folders(tasks: Sequence[Task]) -> dict[str, str]:
    """The folders of the tasks' bases, found in a process of its own: this one loads no torch."""
    return {task.name: run_module("benchmarks.method_bases", task.model)["folder"] for task in tasks}


def run_all(kept: Kept, runs: Sequence[tuple[Task, Method, Side, int]], busy: bool) -> list[str]:
    """Measure what isn't kept yet; the runs that failed, with what they said.

    Args:
        busy: other work runs beside, so that the times mean nothing.
    """
    todo = [run for run in runs if not kept.has(key_of(*run), settings_of(run[0], run[1]))]
    bases = folders(list({id(run[0]): run[0] for run in todo}.values()))
    failed = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(todo))
        for task, method, side, seed in todo:
            progress.update(bar, description=f"{task.name}, {method.name}, {side}, seed {seed}")
            try:
                run = measure(task, method, side, seed, bases[task.name])
            except MeasurementError as error:
                failed.append(f"{key_of(task, method, side, seed)}: {error}")
                progress.console.print(f"[red]{escape(failed[-1])}", highlight=False)
            else:
                kept.add(key_of(task, method, side, seed), run | {"timed": not busy})
                said = (
                    f"{key_of(task, method, side, seed)}: {task.score} {run['score']:.3f}, {run['step_seconds']:.2f} s"
                )
                progress.console.print(said, highlight=False)
            progress.advance(bar)
    return failed


def picked(given: Sequence[str], known: dict[str, Any], what: str) -> list[Any]:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise typer.BadParameter(f"no {what} {', '.join(unknown)}; there are: {', '.join(known)}")
    return [known[name] for name in given] or list(known.values())


@app.command(epilog=EXAMPLES)
def main(
    method: Annotated[list[str] | None, typer.Option(help="One method; may be given again.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="orders or reviews; may be given again.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    quantized: Annotated[bool, typer.Option("--quantized", help="LoRA on quantized bases, on the orders.")] = False,
    only_table: Annotated[bool, typer.Option("--table", help="Write the table and the plot, measure nothing.")] = False,
    busy: Annotated[bool, typer.Option("--busy", help="Other work runs beside: these times don't count.")] = False,
    path: Annotated[Path | None, typer.Option("--json", help="Where the runs are kept.")] = None,
) -> None:
    """Tune with every method on two tasks beside peft, and write the tables of the pages in docs/."""
    path = path or FOLDER / "methods.json"
    kept = Kept(path)
    failed: list[str] = []
    if not only_table:
        if not busy:
            warn_if_busy()
        tasks = [TASKS["orders"]] if quantized else picked(task or [], dict(TASKS), "task")
        known = (replace(METHODS[0], in_peft=False), *ON_QUANTIZED) if quantized else METHODS
        methods = picked(method or [], {one.name: one for one in known}, "method")
        failed = run_all(kept, planned(tasks, methods, range(seeds)), busy)
    method_table.write(kept.document)
    quality_table.write(kept.document)
    if failed:
        console.print(f"[red]{len(failed)} runs failed; run the command again to repeat them")
        raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.methods")
