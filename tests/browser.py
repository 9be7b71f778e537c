"""A real headless browser, where one is at hand: what a page does in it, and pictures of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
PHONE, DESK = (360, 740), (1280, 900)
PICTURES = os.environ.get("SLIMTUNE_SCREENSHOTS")
"""A folder for pictures of the pages, as `SLIMTUNE_SCREENSHOTS=docs/studio pytest tests/studio` writes them."""


@dataclass
class Seen:
    """What a page did while it was shown."""

    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    overflow_pixels: int = 0
    broken_images: int = 0
    smallest_text_pixels: float = 0.0
    background: str = ""


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium through playwright; skips the test, and says why, where there is none."""
    found = os.environ.get("SLIMTUNE_TEST_BROWSER") or next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None:
        pytest.skip(f"no headless browser: install Debian's chromium-headless-shell, or one of {', '.join(PROGRAMS)}")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


def picture(tab: Any, name: str) -> None:
    """Keep a picture of the whole page, if pictures are wanted.

    None is taken otherwise: no test looks at it, and a browser on a busy machine may fail to paint a long page.
    """
    if PICTURES:
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=Path(PICTURES) / f"{name}.png", full_page=True)


def look(opened: Any, page: Path, size: tuple[int, int], scheme: str) -> Seen:
    """Show a page in this size and colour scheme, all of its details open."""
    seen = Seen()
    context = opened.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    tab = context.new_page()
    tab.on("console", lambda said: seen.problems.append(said.text) if said.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: seen.problems.append(str(error)))
    tab.on("request", lambda request: seen.requests.append(request.url))
    tab.goto(page.as_uri(), wait_until="load")
    tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    seen.overflow_pixels = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    seen.broken_images = tab.evaluate("[...document.images].filter(each => !each.naturalWidth).length")
    seen.smallest_text_pixels = tab.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].map(each => each.getBoundingClientRect().height))"
    )
    seen.background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    picture(tab, f"{page.stem}-{size[0]}-{scheme}")
    context.close()
    return seen
