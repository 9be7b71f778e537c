"""One command of slimtune in a process of its own: its JSON, its log, and how far it is."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slimtune.errors import TrainingError

STEP = re.compile(r"(\d[\d,]*)/(\d[\d,]*)")
"""Commands that are not on a terminal print a line now and then, with what is done of how much."""
PATIENCE_SECONDS = 60
"""After which a process that was asked to end is killed; until then it may write a checkpoint."""

Progress = Callable[[int, int], None]


def run(arguments: Sequence[str], log: Path, on_progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """What `slimtune ARGUMENTS` prints as JSON; what it says goes to `log`.

    Ctrl-C asks it to end, waits, and goes on upwards: unlike in a shell, the process doesn't hear it itself, and so
    can't take it for the wish to keep half a training.

    Raises:
        TrainingError: it ended with another exit code than 0, in its own words.
    """
    command = [sys.executable, "-m", "slimtune", *arguments]
    with log.open("a", encoding="utf-8") as told:
        told.write(f"$ slimtune {' '.join(arguments)}\n")
        told.flush()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            env=os.environ | {"COLUMNS": "200", "TOKENIZERS_PARALLELISM": "false"}, start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip
        said: list[str] = []
        listener = threading.Thread(target=_listen, args=(process, told, said, on_progress), daemon=True)
        listener.start()
        try:
            assert process.stdout
            printed = process.stdout.read()
            process.wait()
        except BaseException:
            _end(process)
            raise
        finally:
            listener.join(timeout=5)
    if process.returncode:
        raise TrainingError(_reason(process.returncode, said))
    return _read(printed, arguments[0])


def _listen(process: subprocess.Popen[str], told: Any, said: list[str], on_progress: Progress) -> None:
    assert process.stderr
    for line in process.stderr:
        with contextlib.suppress(ValueError):  # closed, because the process did not end in time
            told.write(line)
            told.flush()
        said.append(line.strip())
        found = STEP.search(line)
        if found:
            on_progress(*(int(number.replace(",", "")) for number in found.groups()))


def _read(printed: str, command: str) -> dict[str, Any]:
    try:
        return json.loads(printed.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise TrainingError(f"slimtune {command} printed no JSON, but {printed[-200:]!r}") from error


def _reason(code: int, said: Sequence[str]) -> str:
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
