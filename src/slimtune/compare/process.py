"""The commands of a run in a process of its own: how far it is, its log, and what it ended with."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from slimtune.cli.compare_worker import BEGINS
from slimtune.console.progress import read_line

WORKER = (sys.executable, "-m", "slimtune.cli.compare_worker")
PATIENCE_SECONDS = 60
"""After which a process that was asked to end is killed; until then it may write a checkpoint."""


class Listener(Protocol):
    """Who is told how far the commands are."""

    def stage(self, name: str) -> None:
        """A command begins."""
        ...

    def advance(self, done: int, total: int) -> None:
        """The command is so far."""
        ...


@dataclass(frozen=True)
class Failure:
    """The command that ended a process, and why, in its own words."""

    command: str
    reason: str


def run(commands: Sequence[Sequence[str]], folder: Path, log: Path, listener: Listener) -> Failure | None:
    """Call `slimtune COMMAND` for each of these, up to the first that fails; `worker` says what becomes of the answers.

    Ctrl-C asks the process to end, waits, and goes on upwards: unlike in a shell, the process doesn't hear it itself,
    and so can't take it for the wish to keep half a training.
    """
    with log.open("a", encoding="utf-8") as told:
        process = subprocess.Popen(
            [*WORKER, str(folder), json.dumps(commands)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
            env=os.environ | {"COLUMNS": "200", "TOKENIZERS_PARALLELISM": "false"},
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip
        heard = _Heard(commands[0][0])
        thread = threading.Thread(target=heard.listen, args=(process, told, listener), daemon=True)
        thread.start()
        try:
            process.wait()
        except BaseException:
            _end(process)
            raise
        finally:
            thread.join(timeout=5)
    return Failure(heard.command, reason(process.returncode, heard.said)) if process.returncode else None


class _Heard:
    """What a process said of the command that it is at."""

    def __init__(self, command: str) -> None:
        self.command, self.said = command, list[str]()

    def listen(self, process: subprocess.Popen[str], told: Any, listener: Listener) -> None:
        assert process.stderr
        for line in process.stderr:
            with contextlib.suppress(ValueError):  # closed, because the process did not end in time
                told.write(line)
                told.flush()
            self.said.append(line.strip())
            if line.startswith(BEGINS):
                self.command, self.said = line.removeprefix(BEGINS).split()[0], []
                listener.stage(self.command)
            elif progress := read_line(line):
                listener.advance(*progress)


def reason(code: int, said: Sequence[str]) -> str:
    """The sentence that slimtune ended with, the last line of a traceback, or the signal."""
    if code < 0:
        hint = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    own = [line.removeprefix("slimtune: ") for line in said if line.startswith("slimtune: ")]
    return (own or [line for line in said if line] or [f"exit code {code}"])[-1]


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_with_parent() -> None:
    """A run whose comparison was killed would take the processor from the one that goes on."""
    prctl_set_death_signal = 1
    ctypes.CDLL(None).prctl(prctl_set_death_signal, signal.SIGTERM)
