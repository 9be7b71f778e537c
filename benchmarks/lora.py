"""LoRA of slimtune beside peft and beside the frozen floor: the command.

A round lets every side measure once, one after the other, so that what else the machine does hits all sides
alike; ratios are taken round by round and their median is shown.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import machine, results, table
from benchmarks.cases import CPU_CASES, CUDA_CASES, QUANTIZED_CASES, QUANTIZED_CUDA_CASES, Case, quick
from benchmarks.runs import Bench, MeasurementError

CASES = {"cpu": CPU_CASES + QUANTIZED_CASES, "cuda": CUDA_CASES + QUANTIZED_CUDA_CASES}
EXAMPLES = """
Examples:

    python -m benchmarks --quick                      does everything run?

    python -m benchmarks --rounds 5                   all cases; writes benchmarks/results/

    python -m benchmarks --case bf16 --case dropout   these cases only

    python -m benchmarks --quantized                  quantized bases; fills in docs/figures/quantized.md

    python -m benchmarks --case bf16 --profile        where time and memory go

    python -m benchmarks --case bf16 --ours peft      peft against itself: how large is the noise?
"""

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
console = Console()


def chosen(device: str, names: Sequence[str], small: bool, quantized: bool) -> list[Case]:
    """The cases of a device by name, or all of them."""
    cases = {case.name: case for case in CASES[device] if case.work.quantize or not quantized}
    unknown = sorted(set(names) - set(cases))
    if unknown:
        raise typer.BadParameter(f"no case {', '.join(unknown)}; there are: {', '.join(cases)}")
    picked = [cases[name] for name in names] or list(cases.values())
    return [quick(case) for case in picked] if small else picked


def warn_if_busy() -> None:
    if machine.load() > machine.BUSY_SHARE * machine.cores():
        console.print(f"[yellow]The machine is busy (load {machine.load():.1f}): the times will be noisy.")


def measure(bench: Bench, cases: Sequence[Case], rounds: int, path: Path | None, keep: bool) -> None:
    """Case by case; what is measured is on disk before the next case starts."""
    records: dict[str, Any] = {}
    for case in cases:
        load = machine.load()
        done = bench.rounds(case, rounds)
        records[case.name] = results.record(case, done, load)
        console.print(table.figures(records[case.name]["summary"], case.title))
        if keep:
            on = machine.describe(done[-1]["ours"]["torch"])
            target = path or results.FOLDER / f"lora-{machine.host_kind(on)}.json"
            results.write(target, on, records, CASES[case.work.device])
            if path is None:
                results.show(target, case.work.device)
            console.print(f"Written: {os.path.relpath(target)}", highlight=False)
    console.print(results.NOTE, highlight=False)


def profiles(bench: Bench, cases: Sequence[Case]) -> Iterator[Table]:
    """For every side of every training case: the heaviest operators, and the tensors alive at the peak."""
    for case in cases:
        for side in case.sides if case.work.kind == "train" else ():
            with console.status(f"{case.title}: profiling {side}"):
                found = bench.measure(case, side, profile=True)
            yield from table.profile(f"{case.title}, {side}", found)


@app.command(epilog=EXAMPLES)
def main(
    case: Annotated[list[str] | None, typer.Option(help="One case; may be given again.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often all sides take turns.")] = 5,
    quantized: Annotated[bool, typer.Option("--quantized", help="The cases of quantized bases only.")] = False,
    small: Annotated[bool, typer.Option("--quick", help="One small round; not kept.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write the results.")] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="cuda: Llamas of 1B and 8B.")] = "cpu",
    profile: Annotated[bool, typer.Option("--profile", help="Where a step's time and memory go.")] = False,
    ours: Annotated[str, typer.Option(help="The module that stands on our side.")] = "slimtune",
    model: Annotated[str, typer.Option(help="A folder with SmolLM2, if not the packaged one.")] = "",
) -> None:
    """Measure LoRA of slimtune beside peft and beside the frozen floor, in turns, each in a fresh process."""
    cases = chosen(device, case or [], small, quantized)
    warn_if_busy()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            bench = Bench(ours, model, scratch, console)
            if profile:
                for found in profiles(bench, cases):
                    console.print(found)
            else:
                measure(bench, cases, 1 if small else rounds, json_path, keep=bool(json_path) or not small)
    except MeasurementError as error:
        console.print(f"[red]{escape(str(error))}", highlight=False)
        raise typer.Exit(1) from None
