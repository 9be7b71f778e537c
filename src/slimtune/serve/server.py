"""A started server: it listens, and at SIGTERM or Ctrl-C ends what runs, takes no more, and then stops."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from slimtune.errors import ConfigError, SlimtuneError
from slimtune.serve.address import is_loopback, listen, url_of
from slimtune.serve.gateway import Gateway
from slimtune.serve.http import create_app

logger = logging.getLogger("slimtune.serve")

MOST_CONNECTIONS = 4096


def check_host(host: str, keys: Path | None) -> None:
    """Raises: ConfigError, where everybody on a network could ask."""
    if keys is None and not is_loopback(host):
        raise ConfigError(
            f"without keys, a server on {host} would answer everybody who reaches it; pass --keys FILE (slimtune "
            "serve-key makes it), or --host 127.0.0.1"
        )


def run(
    gateway: Gateway, host: str, port: int, drain_timeout: float, on_ready: Callable[[str], None] = lambda url: None
) -> bool:
    """Serve until a signal; False where answers were broken off. Raises: ConfigError, for an address that is taken.

    Args:
        on_ready: is told the address, which for port 0 is known only then.
    """
    # Bound here and handed over: port 0 gets its number before anybody is told, and an error is ours to word.
    listening = listen(host, port)
    url = url_of(host, listening)
    app = create_app(gateway)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        await gateway.backend.start()
        if hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _reload_keys, gateway)
        on_ready(url)
        yield
        await gateway.backend.stop()

    app.router.lifespan_context = lifespan
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        limit_concurrency=MOST_CONNECTIONS,
        # Behind a proxy the scheme and the client don't matter here, and anybody could make them up.
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    server = _DrainingServer(config, gateway, drain_timeout)
    with listening:
        server.run([listening])
    if not server.started:
        raise ConfigError("the server did not start; its log says why")
    return server.ended_all


def _reload_keys(gateway: Gateway) -> None:
    """At SIGHUP, without a stop; a file with a mistake changes nothing."""
    try:
        gateway.keyring.reload()
        logger.info("the keys were read again: %d tenants", len(gateway.keyring.tenants))
    except SlimtuneError as error:
        logger.error("the keys stay as they were: %s", error)


class _DrainingServer(uvicorn.Server):
    """At the first signal, new requests get 503 until the running ones have ended; the second ends it at once."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, drain_timeout: float) -> None:
        super().__init__(config)
        self.gateway, self.drain_timeout = gateway, drain_timeout
        self.ended_all = True
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until both have ended."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop."""
        if self._loop is None or self.gateway.is_draining:
            self.ended_all = False
            self.should_exit = self.force_exit = True
            return
        self.gateway.is_draining = True
        # A signal handler runs between two bytecodes of whatever is on: nothing of asyncio may be called in it but
        # this.
        self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        logger.info("stopping: running answers end, new requests get 503")
        self.ended_all = await self.gateway.drain(self.drain_timeout)
        # The last bytes are still to be sent.
        await asyncio.sleep(0.1)
        self.should_exit = True
