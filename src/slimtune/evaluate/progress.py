"""Questions answered as a person follows it: a bar with speed and time left, or a line now and then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 10


class ShownAnswers:
    """A bar on a terminal, else a line every ten seconds."""

    def __init__(self, console: Console) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console = console
        columns = (TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
        self.bar = Progress(
            *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
            disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self.began = self.last_line = time.monotonic()

    def __enter__(self) -> ShownAnswers:
        self.task = self.bar.add_task("", total=None, speed="")
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, done: int, count: int) -> None:
        """Move on to so many of all questions."""
        now = time.monotonic()
        speed = done / max(now - self.began, 1e-9)
        self.bar.update(self.task, completed=done, total=count, speed=f"{speed:.1f} questions/s")
        if not self.console.is_terminal and (done == count or now - self.last_line > SECONDS_BETWEEN_LINES):
            left = f"{(count - done) / speed:.0f} s left"
            self.console.print(f"  {done}/{count} questions  {speed:.1f}/s  {left}")
            self.last_line = now
