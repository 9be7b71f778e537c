"""`slimtune serve-key`: a key for a tenant of a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimtune.cli.options import Json
from slimtune.console.screen import print_json, say


def serve_key(
    keys: Annotated[Path, typer.Argument(metavar="FILE", help="The keys file, such as keys.yaml; made where missing.")],
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="Who gets the key.")],
    adapter: Annotated[
        list[str],
        typer.Option("--adapter", "-a", metavar="NAME", help="An adapter it may use; * and ? as in file names."),
    ] = [],  # noqa: B006 - typer copies it
    base: Annotated[bool | None, typer.Option("--base/--no-base", help="Whether it may use the base.")] = None,
    admin: Annotated[bool | None, typer.Option("--admin/--no-admin", help="May load and unload adapters.")] = None,
    requests_per_minute: Annotated[float | None, typer.Option(help="Beyond it, 429.")] = None,
    tokens_per_minute: Annotated[float | None, typer.Option(help="Prompts and answers together.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="The most answers at once; the rest waits.")] = None,
    queue: Annotated[int | None, typer.Option(help="The most requests that wait; beyond it, 429.")] = None,
    as_json: Json = False,
) -> None:
    """Make a key for a tenant, new or known, and print it; the file keeps its SHA-256 alone.

    What is given of a known tenant replaces what was there. A running server reads the file again at SIGHUP.

    Example: slimtune serve-key keys.yaml acme --adapter 'acme-*' --requests-per-minute 600
    """
    from slimtune.serve.tenants import add_key

    fields = {
        "adapters": tuple(adapter) or None, "base": base, "admin": admin, "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute, "concurrency": concurrency, "queue": queue,
    }  # fmt: skip
    key = add_key(keys, tenant, {name: value for name, value in fields.items() if value is not None})
    print_json({"tenant": tenant, "key": key, "file": str(keys)}) if as_json else say(key)
    say(f"for '{tenant}' in {keys}; it can't be shown again", to_errors=True)
