"""`slimtune slim`: a model made smaller in steps, each measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimtune.cli.options import Json, Overwrite
from slimtune.console.screen import open_screen, print_json, say
from slimtune.errors import ConfigError


def slim(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE.yaml|NAME|MODEL",
            help="A recipe; with --example the name of one that ships; with --for a model or an adapter.",
        ),
    ],
    overrides: Annotated[
        list[str], typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings changed.", show_default=False)
    ] = [],  # noqa: B006 - typer copies it
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="The folder to write; by default the recipe's.")
    ] = None,
    example: Annotated[
        bool, typer.Option("--example", help="Print the recipe of that name, such as slim-int4 or slim-all.")
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option("--for", metavar="ENGINE", help="Print the recipe for cpu, vllm or llama.cpp that fits --under."),
    ] = None,
    under: Annotated[str | None, typer.Option(metavar="SIZE", help="The most that is written, such as 100MB.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Tune, prune, distil and quantize a model as a recipe says, with size, speed and quality after each step.

    Writes the last step's model with its report as HTML, Markdown, JSON and a picture. A step that loses more than the
    recipe's section stop allows is refused, and no output is written. Run again, it goes on behind the last step that
    was done.

    Example: slimtune slim slim-depth --example > recipe.yaml

    Example: slimtune slim my-adapter --for cpu --under 100MB data.train=orders.jsonl > recipe.yaml

    Example: slimtune slim recipe.yaml data.train=orders.jsonl --output small
    """
    from slimtune.errors import did_you_mean
    from slimtune.slim.recipe import SlimRecipe, shipped

    if engine is not None or under is not None:
        if engine is None or under is None or example:
            raise ConfigError("--for and --under go together, as --for cpu --under 100MB, and not with --example")
        _print_recipe(recipe, engine, under, overrides, output)
        return

    if example:
        known = shipped()
        if recipe not in known:
            near = did_you_mean(recipe, known) or f"; there are {', '.join(known)}"
            raise ConfigError(f"no recipe '{recipe}' ships{near}")
        say(known[recipe], end="")
        return
    from slimtune.slim.pipeline import slim as run
    from slimtune.slim.report import table

    screen = open_screen(as_json)
    chosen = SlimRecipe.read(Path(recipe), overrides, output)
    report = run(chosen, screen, overwrite)
    if as_json:
        print_json({"output": chosen.output, **report.to_dict()})
        return
    from rich.table import Table

    rows = table(report)
    shown = Table(*rows[0], box=None)
    for row in rows:
        shown.add_row(*row.values())
    screen.print(shown)
    screen.print(f"written to {chosen.output}, with slim_report.html", markup=False)


def _print_recipe(model: str, engine: str, under: str, overrides: list[str], output: Path | None) -> None:
    """The recipe that fits, as YAML that this command takes."""
    from slimtune.recipe.recipe import overridden
    from slimtune.recipe.validation import read_as
    from slimtune.slim.recipe import SlimRecipe
    from slimtune.slim.target import recipe_for
    from slimtune.storage.text_files import dump

    values = recipe_for(model, engine, under, str(output or "small"))
    values = overridden({"model": model, "data": {"train": "train.jsonl", "held_out": 0.1}} | values, overrides)
    read_as(SlimRecipe, values)
    say(dump(values), end="")
