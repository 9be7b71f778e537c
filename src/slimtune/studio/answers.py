"""Commands whose answer a page waits for: each in a process of its own, ended as soon as nobody waits for it.

A page asks again and again with the same arguments until the answer is there, so that no request takes long. The
processes are forked from one that has imported the library already: to import it takes longer than most answers. What
was answered is kept in memory for as long as the files that are named stay as they are, and is found again otherwise.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import runpy
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from slimtune.studio.jobs import PREFIX, last_sentence

MOST_AT_ONCE = 2
KEPT = 64
PATIENCE = 90.0
"""Seconds without a question until nobody waits; browsers let a tab in the background ask once a minute."""
PRELOADED = [
    "slimtune.cli", "slimtune.data.preview", "slimtune.pipeline.show_data", "slimtune.plan.plan",
    "slimtune.plan.simulate", "slimtune.adapters.model", "transformers.models.llama.modeling_llama",
]  # fmt: skip
_SAFE_PATH = "PYTHONSAFEPATH"
_LOOK_SECONDS = 1.0

_Key = tuple[tuple[str, tuple[int, int] | None], ...]


@dataclass(frozen=True)
class Answer:
    """What a command with `--json` came to.

    Attributes:
        output: what it printed for machines.
        errors: what it said to people.
        is_kept: whether the same question has this answer again; one that the machine had no room for is asked anew.
    """

    exit_code: int
    output: str
    errors: str = ""
    is_kept: bool = True

    @cached_property
    def value(self) -> Any:
        """Its JSON; None where it printed none."""
        lines = self.output.strip().splitlines()
        return json.loads(lines[-1]) if lines else None

    @property
    def sentence(self) -> str:
        """Why there is no answer."""
        return last_sentence(self.errors)


@dataclass
class _Work:
    """A command under way.

    Attributes:
        asked: when each tab asked for it last.
    """

    process: Any
    connection: Any
    asked: dict[str, float] = field(default_factory=dict)

    @property
    def is_wanted(self) -> bool:
        # A copy: others ask while this looks.
        return any(time.monotonic() - moment < PATIENCE for moment in list(self.asked.values()))

    def end(self) -> None:
        """End the process, if it was started."""
        if self.process.pid is not None:
            self.process.kill()


class Answers:
    """The answers that pages wait for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[_Key, _Work] = {}
        self._done: dict[_Key, Answer] = {}

    def ask(self, tab: str, arguments: Sequence[str]) -> Answer | None:
        """The answer to a command; None as long as it isn't there: ask again.

        Args:
            tab: who asks; what else it asked for before is given up.
            arguments: behind `slimtune`, with `--json` among them.
        """
        key = tuple((word, _stamp(word)) for word in arguments)
        with self._lock:
            for other, work in self._running.items():
                if other != key:
                    work.asked.pop(tab, None)
                    if not work.asked:
                        work.end()
            if key in self._done:
                return self._done[key] if self._done[key].is_kept else self._done.pop(key)
            if key not in self._running and len(self._running) < MOST_AT_ONCE:
                self._start(key, list(arguments))
            if key in self._running:
                self._running[key].asked[tab] = time.monotonic()
            return None

    def warm_up(self) -> None:
        """Start importing what most answers need, in the background."""
        context = _context()
        if context.get_start_method() == "forkserver":
            from multiprocessing import forkserver

            threading.Thread(target=lambda: _safely(forkserver.ensure_running), daemon=True).start()

    def _start(self, key: _Key, arguments: list[str]) -> None:
        context = _context()
        here, there = context.Pipe(duplex=False)
        work = self._running[key] = _Work(context.Process(target=_run, args=(there, arguments), daemon=True), here)
        threading.Thread(target=self._wait, args=(key, work, there), daemon=True).start()

    def _wait(self, key: _Key, work: _Work, there: Any) -> None:
        """Keep the answer when it comes."""
        answer = _received(work, there)
        with self._lock:
            del self._running[key]
            if answer is not None:
                self._done[key] = answer
                for oldest in list(self._done)[:-KEPT]:
                    del self._done[oldest]


def _received(work: _Work, there: Any) -> Answer | None:
    """What a command comes to; None for one that is ended, since nobody waits for it."""
    try:
        # Here and not in the request: it takes as long as the fork server still imports.
        _safely(work.process.start)
    except (OSError, EOFError) as error:
        work.connection.close()
        why = f"no process can be started to work on it: {error}; free some memory, or end some programs"
        return Answer(1, "", PREFIX + why, is_kept=False)
    finally:
        there.close()
    while not work.connection.poll(_LOOK_SECONDS):
        if not work.is_wanted:
            work.end()
    try:
        return Answer(*work.connection.recv())
    except EOFError:
        pass
    finally:
        work.connection.close()
        work.process.join()
    if not work.is_wanted:
        return None
    why = f"the process that worked on it ended with {work.process.exitcode}; free some memory"
    return Answer(1, "", PREFIX + why, is_kept=False)


def _context() -> Any:
    # Windows can't fork: there a process imports the library anew.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    return context


def _safely(start: Any) -> None:
    """Start a process that imports nothing from the folder in which the studio was started."""
    before = os.environ.get(_SAFE_PATH)
    # By the environment, for the fork server's command line is made by Python.
    os.environ[_SAFE_PATH] = "1"
    try:
        start()
    finally:
        if before is None:
            os.environ.pop(_SAFE_PATH, None)


def _run(connection: Any, arguments: list[str]) -> None:
    """Run a command in this process, and send its exit code and what it printed."""
    sys.argv = ["slimtune", *arguments]
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            runpy.run_module("slimtune", run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except Exception as error:
            code = 1
            errors.write(f"{PREFIX}{type(error).__name__}: {error}\n")
    # The studio may have gone.
    with contextlib.suppress(BrokenPipeError):
        connection.send((code, output.getvalue(), errors.getvalue()))


def _stamp(word: str) -> tuple[int, int] | None:
    """When a file was written and how large it is; None for what is none."""
    try:
        status = Path(word).stat()
    except (OSError, ValueError):
        return None
    return status.st_mtime_ns, status.st_size
