"""A studio that was really started, and a browser that looks at its pages as people do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from browser import DESK, PHONE, PICTURES, picture
from slimtune.studio.app import build_app
from slimtune.studio.security import Access

AXE = (Path(__file__).parent / "studio" / "axe" / "axe.min.js").read_text(encoding="utf-8")
_WITHOUT_PATHS = """here => {
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode;
    text.data = text.data.replaceAll(here, "~");
    if (/\\/pytest-/.test(text.data)) text.data = text.data.replace(/\\/[^ ]*\\/pytest-[^/ ]*\\/[^/ .]*/g, "~");
  }
}"""
_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@dataclass
class Tab:
    """A page of a browser, and what went wrong in it."""

    page: Any
    problems: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    @property
    def overflow_pixels(self) -> int:
        """By how much the page is wider than the screen."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def violations(self) -> list[str]:
        """What axe finds, and where."""
        # Not into frames: a report has a policy of its own, by which nothing runs in it.
        self.page.evaluate(AXE)
        found = self.page.evaluate("rules => axe.run({runOnly: rules, iframes: false})", _RULES)["violations"]
        return [f"{each['id']}: {node['html'][:150]}" for each in found for node in each["nodes"]]

    def picture(self, name: str) -> None:
        """Keep a picture of the whole page, if pictures are wanted, without paths of this machine."""
        if PICTURES:
            self.page.evaluate(_WITHOUT_PATHS, os.getcwd())
            picture(self.page, name)


@contextmanager
def listening_studio(folder: Path, access: Access | None = None) -> Iterator[str]:
    """The address of a studio behind uvicorn, on a thread of the test's process."""
    app = build_app(folder, access)
    with socket.create_server(("127.0.0.1", 0)) as port:
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([port],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the studio did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@contextmanager
def started(folder: Path, port: int = 0, directory: Path | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`slimtune studio` as a process, and its address; killed at the end."""
    words = ["studio", "--folder", str(folder), "--port", str(port), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "slimtune", *words], stdout=subprocess.PIPE, text=True, cwd=directory
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, "the studio did not start"
        yield process, json.loads(line)["url"]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def tab(opened: Any, size: tuple[int, int] = (1280, 900), scheme: str = "light", language: str = "en") -> Iterator[Tab]:
    """A tab of a browser of its own: without what other tabs remember."""
    context = opened.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce", locale=language
    )
    page = context.new_page()
    page.set_default_timeout(240_000)
    seen = Tab(page)
    page.on("console", lambda said: seen.problems.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: seen.problems.append(str(error)))
    page.on(
        "request", lambda asked: seen.strangers.append(asked.url) if httpx.URL(asked.url).host != "127.0.0.1" else None
    )
    yield seen
    context.close()


@contextmanager
def tab_of(opened: Any, size: tuple[int, int] = DESK, language: str = "en-US", scheme: str = "light") -> Iterator[Any]:
    """The page of a tab in which nothing may go wrong until it is closed."""
    with tab(opened, size, scheme, language) as seen:
        yield seen.page
    assert seen.problems == []
    assert seen.strangers == []


def check_accessible(page: Any) -> None:
    """Nothing that axe finds, and nothing wider than the window."""
    seen = Tab(page)
    assert seen.overflow_pixels <= 0
    assert seen.violations() == []


__all__ = ["DESK", "PHONE", "Tab", "check_accessible", "listening_studio", "started", "tab", "tab_of"]
