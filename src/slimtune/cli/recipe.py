"""`slimtune recipe`: write a recipe, check one without training, and the recipes that ship."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimtune.cli.options import Json, Overwrite, console
from slimtune.errors import OutputExistsError, SlimtuneError

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.pipeline.dry_run import DryRun
    from slimtune.recipe.convert.rules import Imported

recipe = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Write, check and import recipes: one YAML file that says a whole training run.\n\n"
    "Example: slimtune recipe init recipe.yaml --for chat",
)

Shipped = Annotated[str, typer.Argument(metavar="NAME", help="One that [bold]slimtune recipe list[/] shows.")]
Path_ = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.")]
Overrides = Annotated[
    list[str],
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the recipe's.", show_default=False),
]


@recipe.command("init")
def init(
    path: Annotated[Path, typer.Argument(metavar="[RECIPE.yaml]", help="The file to write.")] = Path("recipe.yaml"),
    purpose: Annotated[
        str, typer.Option("--for", metavar="NAME", help="One that [bold]slimtune recipe list[/] shows.")
    ] = "chat",
    overwrite: Overwrite = False,
) -> None:
    """Write a recipe with every key in it, those at their defaults commented out. Asks nothing.

    Example: slimtune recipe init recipe.yaml --for classification
    """
    from slimtune.recipe.shipped import commented
    from slimtune.storage.atomic import staged_file

    _refuse_file(path, overwrite)
    text = commented(purpose)
    with staged_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
    console().print(f"written to {path}; set model and data in it, then:  slimtune recipe check {path}", markup=False)


@recipe.command("check")
def check(path: Path_, overrides: Overrides = [], as_json: Json = False) -> None:  # noqa: B006 - typer copies it
    """See without training whether a recipe is right, its data can be learned and it fits; exit code 1 if not.

    Reads every key, the data with the model's own tokenizer, attaches the method to the model's shape and simulates
    a step. No weights are read, nothing is written.

    Example: slimtune recipe check recipe.yaml training.batch_size=16
    """
    from slimtune.pipeline.dry_run import DryRun, dry_run
    from slimtune.recipe.recipe import Recipe

    screen = console(as_json)
    try:
        found = dry_run(Recipe.read(path, overrides), screen)
    except SlimtuneError as error:
        found = DryRun(problems=[str(error)])
    if as_json:
        print(json.dumps({"recipe": str(path), "ok": not found.problems, **asdict(found)}))
    _show(screen, path, found)
    if found.problems:
        raise typer.Exit(1)


@recipe.command("list")
def list_(as_json: Json = False) -> None:
    """The recipes that ship, and what each is for.

    Example: slimtune recipe list
    """
    from slimtune.recipe.shipped import shipped

    known = shipped()
    if as_json:
        print(json.dumps(known))
        return
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, summary in known.items():
        table.add_row(f"[bold]{name}[/]", summary)
    console().print(table, soft_wrap=False)


@recipe.command("show")
def show(
    name: Shipped,
    as_full: Annotated[bool, typer.Option("--full", help="With every other key, commented out.")] = False,
) -> None:
    """Print a recipe that ships.

    Example: slimtune recipe show qlora
    """
    from slimtune.recipe.shipped import commented, text_of

    print(commented(name) if as_full else text_of(name), end="")


@recipe.command("import")
def import_(
    theirs: Annotated[Path, typer.Argument(metavar="THEIRS.yaml", help="A file of LLaMA-Factory or Axolotl.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RECIPE.yaml", help="The recipe to write.")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make a recipe of a training file of LLaMA-Factory or Axolotl.

    Every key of it is translated, or said to change nothing here and why. A key that would change the result and has
    no counterpart is refused by name, and nothing is written.

    Example: slimtune recipe import llama3_lora_sft.yaml --output recipe.yaml
    """
    from slimtune.recipe.convert import import_recipe, text_of
    from slimtune.storage.atomic import staged_file

    _refuse_file(output, overwrite)
    found = import_recipe(theirs)
    with staged_file(output) as scratch:
        scratch.write_text(text_of(found, theirs.name), encoding="utf-8")
    if as_json:
        print(json.dumps({"recipe": str(output), **asdict(found)}))
    _show_imported(console(as_json), output, found)


def _show_imported(screen: Console, output: Path, found: Imported) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, place in sorted(found.translated.items()):
        table.add_row(Text(key), Text(place))
    for key, why in sorted(found.without_effect.items()):
        table.add_row(Text(key), Text(f"no effect: {why}", style="dim"))
    screen.print(f"{found.tool}:", table, soft_wrap=False)
    for key, what in found.different.items():
        screen.print(f"not quite the same: {key}: {what}", markup=False)
    screen.print(f"written to {output}; see whether it fits:  slimtune recipe check {output}", markup=False)


def _show(screen: Console, path: Path, found: DryRun) -> None:
    if found.needed_bytes is not None and found.memory_bytes is not None:
        screen.print(f"planned: {found.needed_bytes / 1e9:.1f} GB of {found.memory_bytes / 1e9:.1f} on {found.device}")
    for note in found.notes:
        screen.print(f"note: {note}", markup=False)
    for problem in found.problems:
        screen.print(f"problem: {problem}", markup=False)
    if not found.problems:
        screen.print(f"{path} can be trained:  slimtune train {path}", markup=False)


def _refuse_file(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise OutputExistsError(f"{path} is a folder; name the file to write")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; choose another name, or pass --overwrite")
