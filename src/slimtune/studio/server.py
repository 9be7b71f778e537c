"""The studio as a server that was started: it listens, says where, and ends at Ctrl-C. What runs goes on."""

from __future__ import annotations

import threading
import webbrowser
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import uvicorn

from slimtune.errors import ConfigError
from slimtune.serve.address import is_loopback, listen, url_of
from slimtune.studio.app import build_app
from slimtune.studio.security import MAX_UPLOAD, Access, check_host


def run(
    folder: Path,
    host: str = "127.0.0.1",
    port: int = 8100,
    password: str | None = None,
    opens: bool = False,
    max_upload: int = MAX_UPLOAD,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until a signal. Raises: ConfigError, for an address that is taken, or open to a network without a password.

    Args:
        opens: show it in the browser.
        on_ready: is told the address, which for port 0 is known only then.
    """
    check_host(host, password)
    app = build_app(folder, Access(password, is_loopback(host), max_upload))
    listening = listen(host, port)
    url = url_of(host, listening)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        # A queue that waited for a machine to be switched on again goes on.
        app.state.studio.jobs.run_on()
        # The methods and their settings take seconds to import, which nobody should wait for at the first click.
        threading.Thread(target=_warm_up, daemon=True).start()
        on_ready(url)
        if opens:
            webbrowser.open(url)
        yield

    app.router.lifespan_context = lifespan
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        # Pages that show a run hold a connection for as long as they are open.
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    with listening:
        server.run([listening])
    if not server.started:
        raise ConfigError("the studio did not start; what it printed says why")


def _warm_up() -> None:
    methods: Any = import_module("slimtune.recipe.method")
    methods.methods()
