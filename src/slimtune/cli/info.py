"""`slimtune info`: what is in a folder, without loading it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from slimtune.cli.options import Json, console


def info(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER", help="An adapter or a model, by folder or Hub id, or a folder that slimtune wrote."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Show what a folder holds: an adapter (method, rank, targets, size, base, which engines take it), a model,
    a classifier on features, a run that was broken off, a checkpoint or a comparison. Nothing is loaded.

    Example: slimtune info tuned
    """
    from slimtune.models.inspect import contents

    facts, engines = contents(folder)
    if as_json:
        print(json.dumps({"folder": folder, **facts, "engines": [asdict(verdict) for verdict in engines]}))
        return
    _show(facts, engines)


def _show(facts: dict[str, Any], engines: list[Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), Text(_readable(name, value)))
    for verdict in engines:
        mark = "[green]takes it[/]" if verdict.takes else "[red]refuses it[/]"
        table.add_row(verdict.engine, Text.from_markup(f"{mark}  ").append(_printable(verdict.note)))
    console().print(table, soft_wrap=False)


def _readable(name: str, value: Any) -> str:
    if name == "bytes":
        return f"{value / 1e6:,.1f} MB"
    if name == "seconds" and value is not None:
        return f"{value:,.0f}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_readable('', item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_readable("", item) for item in value) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and value > 9999 else _printable(str(value))


def _printable(text: str) -> str:
    """Without what would steer the terminal: the names in a folder are anybody's."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
