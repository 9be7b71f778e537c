"""One display over all runs: how many are done, where the present one is, how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from slimtune.compare import format as figures
from slimtune.compare.results import Result
from slimtune.recipe.candidates import Candidate, Run

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 30.0


class ShownRuns:
    """Two bars on a terminal, else a line at each command and now and then."""

    def __init__(self, console: Console, runs: Sequence[Run]) -> None:
        """`runs` are those that are still to be done."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.console, self.left = console, list(runs)
        self.took: list[tuple[Candidate, float]] = []
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.all = self.bar.add_task("runs", total=len(self.left), left="")
        self.one = self.bar.add_task("", total=1, left="")
        self.began = self.stage_began = self.last_line = time.monotonic()
        self.what = ""

    def __enter__(self) -> ShownRuns:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def begin(self, run: Run) -> None:
        """Name it."""
        self.run, self.began = run, time.monotonic()

    def stage(self, name: str) -> None:
        """Begin its bar anew."""
        self.what, self.stage_began = f"{self.run}: {name}", time.monotonic()
        self.bar.reset(self.one, description=self.what, total=1, left="")
        self._line(self.what)

    def advance(self, done: int, total: int) -> None:
        """Move it on."""
        now = time.monotonic()
        left = (now - self.stage_began) / max(done, 1) * (total - done)
        self.bar.update(self.one, completed=done, total=total, left=f"{figures.duration(left)} left")
        if now - self.last_line > LINE_SECONDS:
            self._line(f"  {self.what} {done:,}/{total:,}")

    def end(self, run: Run, result: Result) -> None:
        """Tell what came out."""
        self.left.remove(run)
        seconds = time.monotonic() - self.began
        self.took.append((run.candidate, seconds))
        self.bar.update(self.all, advance=1, left=self.time_left())
        outcome = f"{result.score.name} {result.score.mean:.3f}" if result.score else f"failed: {result.reason}"
        self.console.print(f"{run}: {outcome} ({figures.duration(seconds)}) {self.time_left()}", markup=False)

    def time_left(self) -> str:
        """From runs of the same candidate, else of the same kind; nothing while a kind has not been run at all."""
        if not self.left:
            return ""
        expected = [self._expected(run) for run in self.left]
        known = [seconds for seconds in expected if seconds is not None]
        more = "at least " if len(known) < len(expected) else ""
        return f"{more}{figures.duration(sum(known))} left" if known else ""

    def _expected(self, run: Run) -> float | None:
        alike = [seconds for candidate, seconds in self.took if candidate.is_trained == run.candidate.is_trained]
        own = [seconds for candidate, seconds in self.took if candidate == run.candidate]
        return fmean(own or alike) if alike else None

    def _line(self, text: str) -> None:
        if not self.console.is_terminal:
            self.console.print(text, markup=False)
            self.last_line = time.monotonic()
