"""What is shown to people and printed for machines: the boundary that all text of files and models passes.

Names, data, answers and errors come from files that anybody wrote. Characters that would steer a terminal are shown
escaped: `open_screen` for what rich lays out, `say` for plain lines, `print_json` for machines.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_LAYOUT = frozenset("\n\t")
_NO_EDGE = 100_000
_JOINERS = frozenset("\u200c\u200d")
"""Invisible, and part of how Persian, Hindi and emoji are written."""
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"})
"""Categories of Unicode that have no shape of their own: controls, directions, surrogates, line separators."""


def printable(text: str, layout: frozenset[str] = _LAYOUT) -> str:
    r"""Text with every character escaped that a terminal would obey and not show: ESC becomes `\x1b`.

    Args:
        layout: control characters that stay; line breaks and tabs, unless the text has to stay on one line.
    """
    # Nearly all text ends here, at the speed of C.
    if text.isprintable():
        return text
    kept = layout | _JOINERS
    return "".join(c if c in kept or unicodedata.category(c) not in _UNPRINTABLE else _escaped(c) for c in text)


def one_line(text: str) -> str:
    """Text that can't break the line or the sentence in which it stands."""
    return printable(text, frozenset())


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def open_screen(as_json: bool = False, works_on: bool = False) -> Console:
    """Where people read: standard output, or standard error where standard output is for JSON.

    Args:
        works_on: whether the work goes on, unheard, once the reader of the output has gone (`| head`); for what
            writes to disk. Otherwise that is a BrokenPipeError.
    """
    # Soft-wrapped, so that rich breaks no line: a sentence that is copied has no line breaks in it.
    screen: Any = _console_class()(stderr=as_json, highlight=False, soft_wrap=True)
    screen.works_on = works_on
    return screen


def silence(stream: TextIO) -> None:
    """Send nowhere what a stream whose reader has gone still holds, and what is written to it from now on."""
    with contextlib.suppress(OSError, ValueError):
        # At the descriptor and not the object: Python flushes the stream once more as it ends, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@functools.cache
def _console_class() -> type[Console]:
    """rich's console, which is imported late: `--help` has no use for it."""
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

    class EscapingConsole(Console):
        """Escapes whatever is laid out; rich's own colours are added behind this point."""

        def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else printable(text), style, control)

        works_on = False

        def on_broken_pipe(self) -> None:
            if not self.works_on:
                raise
            silence(cast("TextIO", self.file))

    return EscapingConsole


def say(text: object = "", to_errors: bool = False, end: str = "\n") -> None:
    """Print plain text: to standard output what was wanted, to standard error what is said beside it."""
    print(printable(str(text)), file=sys.stderr if to_errors else sys.stdout, end=end, flush=to_errors or not end)


def print_json(value: Any) -> None:
    """Print a line of JSON to standard output; a number that JSON has no word for is null."""
    print(json.dumps(finite(value), allow_nan=False))


def finite(value: Any) -> Any:
    """A value of JSON in which infinite numbers and those that are none are None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain_table(rows: Iterable[Sequence[Any]]) -> Table:
    """A table without head and lines, with names on the left."""
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    return table


def print_table(screen: Console, rows: Iterable[Sequence[Any]]) -> None:
    """Print a plain table: broken at the edge of a terminal, and a line a row in a pipe, which has no edge."""
    if not screen.is_terminal:
        # Set here, for `print` takes no width beyond that of the console.
        screen.width = _NO_EDGE
    screen.print(plain_table(rows), soft_wrap=False)
