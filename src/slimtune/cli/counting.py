"""Long work as a person follows it: a bar with speed and time left; without a terminal, a line now and then."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 10.0


class Counting:
    """Stages of work, each named with its unit ("reading tokens"); a context that gives the terminal back."""

    def __init__(self, screen: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.screen = screen
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}  {task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=screen,
            disable=not screen.is_terminal,
        )
        self.what, self.total, self.done = "", 0, 0
        self.began = self.last_line = time.monotonic()

    def __enter__(self) -> Counting:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def start(self, what: str, total: int) -> None:
        """Begin a stage."""
        self.what, self.total, self.done = what, total, 0
        self.began = self.last_line = time.monotonic()
        self.task = self.bar.add_task(what, total=total, speed="")

    def advance(self, count: int = 1) -> None:
        """So many units more are done."""
        self.done += count
        now = time.monotonic()
        rate = self.done / max(now - self.began, 1e-9)
        self.bar.update(self.task, advance=count, speed=f"{rate:,.{0 if rate >= 10 else 1}f}/s")
        if not self.screen.is_terminal and now - self.last_line > LINE_SECONDS:
            left = (self.total - self.done) / rate
            self.screen.print(f"  {self.what}: {self.done:,}/{self.total:,}, {rate:,.1f}/s, {left:.0f} s left")
            self.last_line = now
