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
        str, typer.Argument(metavar="RECIPE.yaml|NAME", help="A recipe; with --example the name of one that ships.")
    ],
    overrides: Annotated[
        list[str], typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings changed.", show_default=False)
    ] = [],  # noqa: B006 - typer copies it
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="The folder to write; by default the recipe's.")
    ] = None,
    example: Annotated[
        bool, typer.Option("--example", help="Print the recipe of that name: slim-depth or slim-width.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Prune and distil a model as a recipe says, with size, speed and quality measured after each step.

    Writes the last step's model with its report as HTML, Markdown, JSON and a picture. A step that loses more than the
    recipe's section stop allows is refused, and no output is written. Run again, it goes on behind the last step that
    was done.

    Example: slimtune slim slim-depth --example > recipe.yaml

    Example: slimtune slim recipe.yaml data.train=orders.jsonl --output small
    """
    from slimtune.errors import did_you_mean
    from slimtune.slim.recipe import SlimRecipe, shipped

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
