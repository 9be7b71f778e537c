"""`slimtune studio`: the pages for people who would rather look than type."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimtune.cli.options import Json
from slimtune.console.screen import print_json, say
from slimtune.errors import require

_GIGABYTE = 10**9


def studio(
    folder: Annotated[
        Path, typer.Option("--folder", metavar="RUNS", help="The folder of the runs; made if it isn't there.")
    ] = Path("runs"),
    host: Annotated[str, typer.Option(help="Another one than the own machine needs --password-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8100,
    password_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its first line is the password that the pages ask for.")
    ] = None,
    opens: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    max_upload: Annotated[float, typer.Option(min=0, metavar="GB", help="The largest file that can be dropped.")] = 2.0,
    as_json: Json = False,
) -> None:
    """Data, plan, training, results, chat, export and the history of runs as pages in a browser.

    What a page does is a command of this library that it shows. Commands run in processes of their own: they go on when
    the browser or the studio is closed, and are found again. Runs that a terminal began in the folder are seen, too.

    With --json, the address is a line of JSON. Exit codes: 130 ended by Ctrl-C, 2 a mistake, as a port that is taken.

    Example: slimtune studio --folder runs --open
    """
    _require_libraries()
    from slimtune.studio.security import read_password
    from slimtune.studio.server import run

    def tell(url: str) -> None:
        if as_json:
            print_json({"url": url, "folder": str(folder.absolute())})
        say(f"the studio of {folder} is at {url}; Ctrl-C ends it, and what it trains goes on", to_errors=True)

    password = read_password(password_file) if password_file else None
    run(folder, host, port, password, opens, round(max_upload * _GIGABYTE), tell)


def _require_libraries() -> None:
    require("fastapi", extra="studio", purpose="the studio")
    require("httpx", extra="studio", purpose="the studio")
    require("jinja2", extra="studio", purpose="the studio")
    require("prometheus-client", extra="studio", purpose="the studio")
    require("python-multipart", extra="studio", purpose="the studio")
    require("uvicorn", extra="studio", purpose="the studio")
