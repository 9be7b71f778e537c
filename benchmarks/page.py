"""Pages of the docs, whose tables stand between two marks of one name: `<!-- name -->`."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.machine import ROOT

QUANTIZED = ROOT / "docs" / "figures" / "quantized.md"
SLIM = ROOT / "docs" / "quantizing.md"
ENGINE = ROOT / "docs" / "engine.md"
PRUNED = ROOT / "docs" / "slim.md"


def fill(page: Path, name: str, text: str) -> None:
    """Put a text between the page's marks; raises ValueError where the page has no such marks."""
    mark = f"<!-- {name} -->"
    pattern = re.compile(rf"{mark}.*?{mark}", re.DOTALL)
    found, count = pattern.subn(lambda _: f"{mark}\n{text.strip()}\n{mark}", page.read_text())
    if count != 1:
        raise ValueError(f"{page} has {count} pairs of {mark}; one is needed")
    page.write_text(found)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ("---",) * len(header), *rows))
