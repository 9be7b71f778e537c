"""Intruder dimensions, ranks and forgetting of LoRA, rsLoRA, DoRA and full tuning on the orders, over seeds.

Each run is a process of its own and one line of JSON, written before the next run starts: a benchmark that was cut off
goes on where it stopped.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import machine, page
from benchmarks.intruder_cases import METHODS, Size, settings_of
from benchmarks.lora import warn_if_busy
from benchmarks.method_cases import Method
from benchmarks.methods import picked
from benchmarks.results import FOLDER
from benchmarks.runs import MeasurementError, run_module

EXAMPLES = """
Examples:

    python -m benchmarks.intruders                                    all methods, three seeds; docs/spectra.md

    python -m benchmarks.intruders --method full --seeds 1            one method once

    python -m benchmarks.intruders --steps 4 --layers 1 --seeds 1 --json /tmp/try.jsonl --no-page   only a try

    python -m benchmarks.intruders --table                            only write the page anew
"""
PAGE = machine.ROOT / "docs" / "spectra.md"

Run = dict[str, Any]
console = Console()


@dataclass(frozen=True)
class Kept:
    """The runs on disk, a line each; of two of the same, the later one counts."""

    path: Path

    def runs(self) -> list[Run]:
        if not self.path.exists():
            return []
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return list({(run["method"], run["seed"], json.dumps(run["settings"])): run for run in lines}.values())

    def has(self, method: Method, seed: int, settings: Run) -> bool:
        return any((r["method"], r["seed"], r["settings"]) == (method.name, seed, settings) for r in self.runs())

    def add(self, run: Run) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(run) + "\n")


def run_all(kept: Kept, methods: Sequence[Method], seeds: int, size: Size) -> list[str]:
    """Measure what isn't kept yet; the runs that failed, with what they said."""
    todo = [(method, seed) for seed in range(seeds) for method in methods]
    todo = [(method, seed) for method, seed in todo if not kept.has(method, seed, settings_of(method, size))]
    failed = []
    folder = run_module("benchmarks.method_bases", size.task().model)["folder"] if todo else ""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch, Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(todo))
        for method, seed in todo:
            progress.update(bar, description=f"{method.name}, seed {seed}")
            try:
                run = measure(method, seed, size, folder, scratch)
            except MeasurementError as error:
                failed.append(f"{method.name}, seed {seed}: {error}")
                progress.console.print(f"[red]{escape(failed[-1])}", highlight=False)
            else:
                kept.add(run)
                said = f"{method.name}, seed {seed}: {run['intruders_10']} intruders, score {run['score']:.2f}"
                progress.console.print(said, highlight=False)
            progress.advance(bar)
    return failed


def measure(method: Method, seed: int, size: Size, folder: str, scratch: str) -> Run:
    specification = {
        "method": method.name, "seed": seed, "size": asdict(size), "folder": folder, "scratch": scratch
    }  # fmt: skip
    found = run_module("benchmarks.intruder_worker", json.dumps(specification))
    about = {"date": machine.today(), "commit": machine.commit(), "machine": machine.describe(found.pop("torch"))}
    return {"method": method.name, "seed": seed, "settings": settings_of(method, size), **found, **about}


COLUMNS: dict[str, tuple[Callable[[Run], float], str]] = {
    "exact match": (lambda run: run["score"], ".2f"),
    "intruders, k=10": (lambda run: run["intruders_10"], ".1f"),
    "intruders, k=100": (lambda run: run["intruders_100"], ".1f"),
    "lowest cosine": (lambda run: run["lowest_cosine"], ".3f"),
    "effective rank": (lambda run: run["effective_rank"], ".1f"),
    "stable rank": (lambda run: run["stable_rank"], ".1f"),
    "change": (lambda run: run["relative_norm"], ".2%"),
    "forgetting": (lambda run: run["forgetting"]["mean"], "+.4f"),
}
"""Of the table, each the mean over the seeds with their range."""


def table(runs: Sequence[Run]) -> str:
    """A row for each method, in the order of `METHODS`."""
    rows = []
    for method in METHODS:
        own = [run for run in runs if run["method"] == method.name]
        if own:
            rows.append((method.name, str(len(own)), *(_cell(own, *column) for column in COLUMNS.values())))
    return page.table(("method", "seeds", *COLUMNS), rows)


def _cell(own: Sequence[Run], value: Callable[[Run], float], form: str) -> str:
    values = [value(run) for run in own]
    spread = f" ({min(values):{form}} to {max(values):{form}})" if len(set(values)) > 1 else ""
    return f"{mean(values):{form}}{spread}"


def about(runs: Sequence[Run]) -> str:
    """What the figures were measured on."""
    last = runs[-1]
    on, settings = last["machine"], last["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in on["versions"].items() if version)
    return (
        f"{settings['steps']} steps of 8 orders, {last['matrices']} matrices; {settings['questions']} questions; "
        f"{settings['texts']} texts a domain. Means over the seeds, with their range. "
        f"{on['cpu']}, {on['cores']} cores; {versions}; {last['date']}."
    )


def write(kept: Kept, size: Size) -> None:
    """Put the table of this size's runs into the page."""
    wanted = {method.name: settings_of(method, size) for method in METHODS}
    runs = [run for run in kept.runs() if wanted.get(run["method"]) == run["settings"]]
    if runs:
        page.fill(PAGE, "intruders", f"{table(runs)}\n\n{about(runs)}")


def main(
    method: Annotated[list[str] | None, typer.Option(help="One method; may be given again.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    steps: Annotated[int, typer.Option(min=4, help="Of training, 8 orders each.")] = Size.steps,
    questions: Annotated[int, typer.Option(min=1, help="Orders to answer for the score.")] = Size.questions,
    texts: Annotated[int, typer.Option(min=1, help="Of each domain, for forgetting.")] = Size.texts,
    layers: Annotated[int | None, typer.Option(min=1, help="Take only so many blocks apart.")] = None,
    only_table: Annotated[bool, typer.Option("--table", help="Write the page, measure nothing.")] = False,
    with_page: Annotated[bool, typer.Option("--page/--no-page", help="Write docs/spectra.md.")] = True,
    path: Annotated[Path, typer.Option("--json", help="Where the runs are kept.")] = FOLDER / "intruders.jsonl",
) -> None:
    """Train, take apart, measure what was forgotten, and write the table of docs/spectra.md."""
    kept, size = Kept(path), Size(steps, questions, texts, layers=layers)
    failed: list[str] = []
    if not only_table:
        warn_if_busy()
        failed = run_all(kept, picked(method or [], {one.name: one for one in METHODS}, "method"), seeds, size)
    runs = kept.runs()
    if runs:
        console.print(table(runs), markup=False, highlight=False, soft_wrap=True)
    if with_page:
        write(kept, size)
    if failed:
        console.print(f"[red]{len(failed)} runs failed; run the command again to repeat them")
        raise typer.Exit(1)


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
app.command(epilog=EXAMPLES)(main)

if __name__ == "__main__":
    app(prog_name="python -m benchmarks.intruders")
