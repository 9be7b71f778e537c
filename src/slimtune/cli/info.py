"""`slimtune info`: what is in a folder, without loading it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from slimtune.cli.options import Json
from slimtune.console.screen import one_line, open_screen, print_json, print_table


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
        print_json({"folder": folder, **facts, "engines": [asdict(verdict) for verdict in engines]})
        return
    _show(facts, engines)


def _show(facts: dict[str, Any], engines: list[Any]) -> None:
    from rich.text import Text

    rows = [(name.replace("_", " "), Text(_readable(name, value))) for name, value in facts.items()]
    for verdict in engines:
        mark = "[green]takes it[/]" if verdict.takes else "[red]refuses it[/]"
        rows.append((verdict.engine, Text.from_markup(f"{mark}  ").append(one_line(verdict.note))))
    print_table(open_screen(), rows)


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
    return f"{value:,}" if isinstance(value, int) and value > 9999 else one_line(str(value))
