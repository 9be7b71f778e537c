"""The bar of long work, on a terminal and without one."""

from __future__ import annotations

import io

from rich.console import Console

from slimtune.console.progress import Counting


def shown(is_terminal: bool) -> str:
    screen = io.StringIO()
    with Counting(Console(file=screen, force_terminal=is_terminal, width=120, color_system=None)) as counting:
        counting.start("reading tokens", 10)
        counting.advance(4)
        counting.reach(10, beside="loss 0.5000")
        counting.start("writing rows", 3)
        counting.watch.step(3)
    return screen.getvalue()


def test_a_terminal_has_a_bar_with_what_stands_beside() -> None:
    drawn = shown(is_terminal=True)
    for part in ("reading tokens", "10/10", "loss 0.5000", "writing rows", "3/3", "/s", "left"):
        assert part in drawn, part


def test_without_a_terminal_there_is_a_line_for_each_stage() -> None:
    first, second = shown(is_terminal=False).splitlines()
    assert "reading tokens 10/10  loss 0.5000" in first
    assert "writing rows 3/3" in second
