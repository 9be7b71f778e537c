"""`slimtune methods`: what can be chosen with `train --method`, and what each has to set."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimtune.cli.options import Json, console

if TYPE_CHECKING:
    from slimtune.recipe.method import Method


def methods(
    name: Annotated[str | None, typer.Argument(help="Show the fields of this method, with their defaults.")] = None,
    as_json: Json = False,
) -> None:
    """List the tuning methods, or the fields of one that a recipe has as method.NAME.

    Example: slimtune methods ia3
    """
    from slimtune.recipe.method import find
    from slimtune.recipe.method import methods as known

    chosen = [find(name)] if name else list(known().values())
    if as_json:
        found = [_facts(method) for method in chosen]
        print(json.dumps(found[0] if name else found))
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
    console().print(method.summary, markup=False)
    if method.config.learning_rate is not None:
        console().print(f"learning rate: {method.config.learning_rate:g} by default")
    if method.is_adapter:
        console().print(f"its files are {'read by peft too' if method.in_peft else 'unknown to peft'}")
    _show({field: str(value) for field, value in method.fields.items()})


def _show(rows: dict[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", Text(value))
    console().print(table, soft_wrap=False)
