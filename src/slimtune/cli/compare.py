"""`slimtune compare`: methods and prompting under one budget, and a page that says which to choose."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimtune.cli import proposals
from slimtune.cli.options import Json, TrustRemoteCode
from slimtune.console.screen import open_screen, print_json
from slimtune.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.compare.comparison import Comparison
    from slimtune.compare.report import ComparisonReport

WHAT, BUDGET, OUT = "What is compared", "Budget, the same for all", "What comes out"


def compare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="Model, data and training, as for train.")],
    overrides: Annotated[
        list[str],
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Other settings of the recipe.", show_default=False),
    ] = [],  # noqa: B006 - typer copies it
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Between commas: any of [bold]slimtune methods[/], qlora (lora on a base in NF4), and variants with "
            "fields, such as lora:r=64. '' for none.",
            rich_help_panel=WHAT,
            autocompletion=proposals.lists_of_methods,
        ),
    ] = None,
    shots: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS",
            help="Examples in the prompt; 0,1,4 of models that write text. '' for none.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    random_labels: Annotated[
        bool | None,
        typer.Option(
            "--random-labels/--no-random-labels",
            help="Try the longest prompt with answers dealt at random, too.",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs of each method, each with a seed; 3 or more.", rich_help_panel=WHAT)
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Of training, in place of the recipe's.", rich_help_panel=BUDGET)
    ] = None,
    questions: Annotated[
        int | None, typer.Option(min=2, help="Of those held out, from the first on.", rich_help_panel=BUDGET)
    ] = None,
    scorer: Annotated[
        str | None, typer.Option(help="Of answers, as slimtune evaluate has them.", rich_help_panel=WHAT)
    ] = None,
    texts: Annotated[
        int | None,
        typer.Option(min=0, help="Of each set that forgetting is measured on; 0 skips it.", rich_help_panel=BUDGET),
    ] = None,
    spectra: Annotated[
        str | None,
        typer.Option(help="Singular values of all seeds, of the first, or none.", rich_help_panel=BUDGET),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Runs and report.", rich_help_panel=OUT)
    ] = Path("comparison"),
    price: Annotated[
        str | None,
        typer.Option(
            metavar="USD|DEVICE", help="Of an hour of this machine, or the device that it has.", rich_help_panel=OUT
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the runs and about how long they take; run nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tune with several methods, prompt with examples, and say which to choose and how sure that is.

    Every run is a process of its own, one after the other. The same command again goes on where it was stopped, and
    tries again what failed; methods and seeds can be added. Writes report.html, which needs nothing else, report.md
    and pictures. Options come before the compare section of the recipe. Exit code 1 if a run failed.

    Example: slimtune compare recipe.yaml --methods full,lora,qlora --shots 0,4 --seeds 3 --output comparison
    """
    from slimtune.compare.comparison import prepare
    from slimtune.compare.report import PAGE

    options: dict[str, Any] = {
        "methods": None if methods is None else _names(methods),
        "shots": None if shots is None else _numbers(shots),
        "random_labels": random_labels,
        "seeds": seeds,
        "max_steps": max_steps,
        "questions": questions,
        "scorer": scorer,
        "texts": texts,
        "spectra": spectra,
    }
    settings = {name: value for name, value in options.items() if value is not None}
    screen = open_screen(as_json, works_on=True)
    if dry_run:
        with TemporaryDirectory() as scratch:
            _foresee(
                screen, prepare(recipe, overrides, settings, output, price, trust_remote_code, Path(scratch)), as_json
            )
        return
    outcome = _run(screen, prepare(recipe, overrides, settings, output, price, trust_remote_code))
    if as_json:
        print_json({"output": str(output), "report": str(output / PAGE), **outcome.to_dict()})
    else:
        _show(screen, outcome)
    screen.print(f"the report: {output / PAGE}", markup=False)
    if any(row.failed for row in outcome.summary.rows):
        raise typer.Exit(1)


def _run(screen: Console, comparison: Comparison) -> ComparisonReport:
    from slimtune.compare.progress import ShownRuns
    from slimtune.compare.runner import unfinished

    for remark in comparison.facts.remarks:
        screen.print(remark, markup=False)
    todo = unfinished(comparison.setup, comparison.runs)
    if len(todo) < len(comparison.runs):
        screen.print(f"{len(comparison.runs) - len(todo)} of {len(comparison.runs)} runs are there already")
    try:
        with ShownRuns(screen, todo) as watcher:
            return comparison.run(watcher)
    except KeyboardInterrupt:
        screen.print("stopped; the same command goes on from here", style="yellow")
        raise typer.Exit(130) from None


def _foresee(screen: Console, comparison: Comparison, as_json: bool) -> None:
    from rich.table import Table

    from slimtune.compare import format as figures
    from slimtune.compare.estimate import estimate

    with screen.status("simulating the steps..."):
        estimated = estimate(comparison.setup, comparison.runs)
    if as_json:
        lines, remarks = [line.to_dict() for line in estimated.lines], comparison.facts.remarks
        print_json({"runs": lines, "seconds": estimated.seconds, "why": estimated.why, "remarks": remarks})
        return
    table = Table("candidate", "what", "runs", "to do", "a run", "in all", box=None, padding=(0, 2, 0, 0))
    for line in estimated.lines:
        costs = figures.duration(line.seconds), figures.duration(line.seconds_left)
        table.add_row(line.candidate.name, line.candidate.summary, str(line.runs), str(line.todo), *costs)
    screen.print(table, soft_wrap=False)
    total = f"about {figures.duration(estimated.seconds)} in all; " if estimated.seconds is not None else ""
    screen.print(f"{total}{estimated.why}", markup=False)
    for remark in comparison.facts.remarks:
        screen.print(remark, markup=False)


def _show(screen: Console, outcome: ComparisonReport) -> None:
    from rich.markup import escape
    from rich.table import Table

    columns = ("score", "95% interval", "against the best", "forgotten", "memory", "time", "runs")
    shown = [name for name in columns if outcome.rows and name in outcome.rows[0].cells]
    table = Table("", *shown, box=None, padding=(0, 2, 0, 0))
    for line in outcome.rows:
        table.add_row(escape(line.row.name), *(escape(line.cells[name]) for name in shown))
    screen.print(table, soft_wrap=False)
    screen.print(f"\n[bold]{escape(outcome.choice.headline)}[/]")
    screen.print(" ".join(outcome.choice.sentences), markup=False)
    for warning in outcome.choice.warnings:
        screen.print(f"[yellow]warning:[/] {escape(warning)}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in _names(text)]
    except ValueError as error:
        raise ConfigError(f"--shots takes numbers between commas, found '{text}'; pass for example 0,1,4") from error
