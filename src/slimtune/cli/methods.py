"""`slimtune methods`: what can be chosen with `train --method`, and what each has to set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimtune.cli import proposals
from slimtune.cli.options import Json
from slimtune.console.screen import open_screen, print_json, print_table

if TYPE_CHECKING:
    from slimtune.recipe.method import Method


def methods(
    name: Annotated[
        str | None,
        typer.Argument(help="Show the fields of this method, with their defaults.", autocompletion=proposals.methods),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the tuning methods, or the fields of one that a recipe has as method.NAME.

    Example: slimtune methods ia3
    """
    from slimtune.recipe.method import find
    from slimtune.recipe.method import methods as known

    chosen = [find(name)] if name else list(known().values())
    if as_json:
        facts = [_facts(method) for method in chosen]
        print_json(facts[0] if name else facts)
    elif name:
        _show_fields(chosen[0])
    else:
        _show({method.name: method.summary for method in chosen})


def _facts(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "learning_rate": method.config.learning_rate,
        "in_peft": method.in_peft,
        "fields": method.fields,
    }


def _show_fields(method: Method) -> None:
    open_screen().print(method.summary, markup=False)
    if method.config.learning_rate is not None:
        open_screen().print(f"learning rate: {method.config.learning_rate:g} by default")
    if method.is_adapter:
        open_screen().print(f"its files are {'read by peft too' if method.in_peft else 'unknown to peft'}")
    _show({field: str(value) for field, value in method.fields.items()})


def _show(rows: dict[str, str]) -> None:
    from rich.text import Text

    print_table(open_screen(), ((f"[bold]{name}[/]", Text(value)) for name, value in rows.items()))
