"""`slimtune recipe`: write a recipe, check one without training, and the recipes that ship."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimtune.cli import proposals
from slimtune.cli.options import Json, Overwrite, TrustRemoteCode
from slimtune.console.screen import open_screen, print_json, print_table, say
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

Shipped = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="One that [bold]slimtune recipe list[/] shows.", autocompletion=proposals.recipes
    ),
]
Path_ = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.")]
Overrides = Annotated[
    list[str],
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the recipe's.", show_default=False),
]


@recipe.command("init")
def init(
    path: Annotated[Path, typer.Argument(metavar="[RECIPE.yaml]", help="The file to write.")] = Path("recipe.yaml"),
    purpose: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="NAME",
            help="One that [bold]slimtune recipe list[/] shows.",
            autocompletion=proposals.recipes,
        ),
    ] = "chat",
    overwrite: Overwrite = False,
) -> None:
    """Write a recipe with every key in it, the defaults commented out. Asks nothing.

    Example: slimtune recipe init recipe.yaml --for classification
    """
    from slimtune.recipe.shipped import commented
    from slimtune.storage.atomic import write_file

    _refuse_file(path, overwrite)
    text = commented(purpose)
    write_file(path, text)
    open_screen().print(
        f"written to {path}; set model and data in it, then:  slimtune recipe check {path}", markup=False
    )


@recipe.command("check")
def check(
    path: Path_,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """See without training whether a recipe is right, its data can be learned and it fits; exit code 1 if not.

    Reads every key, the data with the model's own tokenizer, attaches the method to the model's shape and simulates
    a step. No weights are read, nothing is written.

    Example: slimtune recipe check recipe.yaml training.batch_size=16
    """
    from slimtune.pipeline.dry_run import DryRun, dry_run
    from slimtune.recipe.recipe import Recipe

    screen = open_screen(as_json)
    try:
        result = dry_run(Recipe.read(path, overrides).trusting(trust_remote_code), screen)
    except SlimtuneError as error:
        result = DryRun(problems=[str(error)])
    if as_json:
        print_json({"recipe": str(path), "ok": not result.problems, **asdict(result)})
    _show(screen, path, result)
    if result.problems:
        raise typer.Exit(1)


@recipe.command("list")
def list_(as_json: Json = False) -> None:
    """The recipes that ship, and what each is for.

    Example: slimtune recipe list
    """
    from slimtune.recipe.shipped import shipped

    known = shipped()
    if as_json:
        print_json(known)
        return
    print_table(open_screen(), ((f"[bold]{name}[/]", text) for name, text in known.items()))


@recipe.command("show")
def show(
    name: Shipped,
    as_full: Annotated[bool, typer.Option("--full", help="With every other key, commented out.")] = False,
) -> None:
    """Print a recipe that ships.

    Example: slimtune recipe show qlora
    """
    from slimtune.recipe.shipped import commented, text_of

    say(commented(name) if as_full else text_of(name), end="")


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
    from slimtune.storage.atomic import write_file

    _refuse_file(output, overwrite)
    imported = import_recipe(theirs)
    write_file(output, text_of(imported, theirs.name))
    if as_json:
        print_json({"recipe": str(output), **asdict(imported)})
    _show_imported(open_screen(as_json), output, imported)


def _show_imported(screen: Console, output: Path, imported: Imported) -> None:
    from rich.text import Text

    rows = [(Text(key), Text(place)) for key, place in sorted(imported.translated.items())]
    rows += [
        (Text(key), Text(f"no effect: {why}", style="dim")) for key, why in sorted(imported.without_effect.items())
    ]
    screen.print(f"{imported.tool}:", markup=False)
    print_table(screen, rows)
    for key, what in imported.different.items():
        screen.print(f"not quite the same: {key}: {what}", markup=False)
    screen.print(f"written to {output}; see whether it fits:  slimtune recipe check {output}", markup=False)


def _show(screen: Console, path: Path, result: DryRun) -> None:
    if result.needed_bytes is not None and result.memory_bytes is not None:
        screen.print(
            f"planned: {result.needed_bytes / 1e9:.1f} GB of {result.memory_bytes / 1e9:.1f} on {result.device}"
        )
    for note in result.notes:
        screen.print(f"note: {note}", markup=False)
    for problem in result.problems:
        screen.print(f"problem: {problem}", markup=False)
    if not result.problems:
        screen.print(f"{path} can be trained:  slimtune train {path}", markup=False)


def _refuse_file(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise OutputExistsError(f"{path} is a folder; name the file to write")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; choose another name, or pass --overwrite")
