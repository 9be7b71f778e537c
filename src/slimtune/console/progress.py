"""Long work as a person follows it: a bar with speed and time left; without a terminal, a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 10.0


@dataclass(frozen=True)
class Watch:
    """Who follows the work; nobody, unless told.

    Attributes:
        start: told what is done next and how many units that has.
        step: told how many more of them are done.
    """

    start: Callable[[str, int], None] = lambda what, total: None
    step: Callable[[int], None] = lambda count: None


class Counting:
    """Stages of work, each named with its unit ("reading tokens"); a context that gives the terminal back.

    Attributes:
        report: called with what is done, and of how much; set where another process shows it.
    """

    report: ClassVar[Callable[[int, int], None] | None] = None

    def __init__(self, screen: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.screen = screen
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}  {task.fields[beside]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=screen,
            # A pipe has no line to write over: there each refresh would be a line of its own.
            disable=not screen.is_terminal,
        )
        self.what, self.total, self.done, self.first = "", 0, 0, 0
        self.began = self.last_line = time.monotonic()

    def __enter__(self) -> Counting:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back."""
        self.bar.stop()

    @property
    def watch(self) -> Watch:
        """What tells this one."""
        return Watch(self.start, self.advance)

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Begin a stage, of which `done` units were there before and count for no speed."""
        self.what, self.total, self.done, self.first = what, total, done, done
        self.began = self.last_line = time.monotonic()
        self.task = self.bar.add_task(what, total=total, completed=done, beside="")
        self.bar.start()

    def advance(self, count: int = 1) -> None:
        """So many units more are done."""
        self.reach(self.done + count)

    def reach(self, done: int, total: int | None = None, beside: str = "") -> None:
        """So many units are done.

        Args:
            total: of how many, if not of as many as in the beginning.
            beside: what stands there in place of the units a second.
        """
        self.done, self.total = done, self.total if total is None else total
        if Counting.report is not None:
            Counting.report(done, self.total)
        now = time.monotonic()
        # The mean since the stage began, and not that of the last units: the time left would jump otherwise.
        rate = (done - self.first) / max(now - self.began, 1e-9)
        beside = beside or f"{rate:,.{0 if rate >= 10 else 1}f}/s"
        self.bar.update(self.task, completed=done, total=self.total, beside=beside)
        if not self.screen.is_terminal and (done >= self.total or now - self.last_line > LINE_SECONDS):
            left = timedelta(seconds=round((self.total - done) / max(rate, 1e-9)))
            self.screen.print(f"  {self.what} {done:,}/{self.total:,}  {beside}  {left} left", markup=False)
            self.last_line = now
