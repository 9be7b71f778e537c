"""A studio that listens, in a thread of the test's process, and a browser that looks at it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from slimtune.serve.address import listen, url_of
from slimtune.studio.app import build_app

DESK, PHONE = (1280, 900), (360, 740)


@contextmanager
def listening_studio(folder: Path) -> Iterator[str]:
    """The address of a studio over a folder of runs."""
    config = uvicorn.Config(build_app(folder), log_level="error", access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with listen("127.0.0.1", 0) as port:
        thread = threading.Thread(target=server.run, args=([port],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the studio did not start"
            time.sleep(0.01)
        yield url_of("127.0.0.1", port)
        server.should_exit = True
        thread.join()


@contextmanager
def tab_of(opened: Any, size: tuple[int, int] = DESK, language: str = "en-US", scheme: str = "light") -> Iterator[Any]:
    """A tab of a browser, in which no script may fail and nothing may be refused by the page's own policy."""
    context = opened.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, locale=language, accept_downloads=True
    )
    tab, problems = context.new_page(), []
    tab.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    yield tab
    context.close()
    assert problems == []


def check_accessible(tab: Any) -> None:
    """No violation of WCAG 2 A and AA that axe finds, and nothing wider than the window."""
    assert tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    axe = pytest.importorskip("axe_core_python.sync_playwright", reason="axe-core-python is not installed").Axe()
    rules = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}}
    # The script is put in by the debugger's protocol, which the page's policy doesn't bind.
    found = axe.run(tab, options=rules)["violations"]
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []
