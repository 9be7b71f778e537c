"""The stages of a run in a spawned process of its own: how far it is, its log, and what it ended with."""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from slimtune.compare.results import Stage
from slimtune.console.failures import sentence_of
from slimtune.console.noise import leave_out_noise, set_up_logging
from slimtune.console.progress import Counting
from slimtune.errors import SlimtuneError
from slimtune.storage.atomic import write_file

PATIENCE_SECONDS = 60
"""After which a process that was asked to end is killed; until then it may write a checkpoint."""
REPORT_SECONDS = 0.2
"""Between two reports of progress."""


class Listener(Protocol):
    """Who follows the stages."""

    def stage(self, name: str) -> None:
        """A stage begins."""
        ...

    def advance(self, done: int, total: int) -> None:
        """The stage is so far."""
        ...


@dataclass(frozen=True)
class Failure:
    """The stage that ended a process, and why, in a sentence."""

    stage: str
    reason: str


Message = str | tuple[int, int] | Failure
"""Of the process: the name of a stage that begins, how many units of it are done and of how many, or its failure."""


def run(stages: Sequence[Stage], folder: Path, log: Path, listener: Listener) -> Failure | None:
    """Do the stages in a new process, up to the first that fails; each keeps its result in `folder` as it ends.

    Ctrl-C asks the process to end, waits, and goes on upwards: unlike in a shell, the process doesn't hear it itself,
    and so can't take it for the wish to keep half a training.
    """
    # Not forked: CUDA can't be used in a fork of a process that has used it.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(list(stages), folder, log, sender))
    process.start()
    # The parent's end: while it is open, the reader never sees the end of the pipe.
    sender.close()
    try:
        stage, failure = _listen(receiver, process, stages[0].name, listener)
        process.join()
    except BaseException:
        _end(process)
        raise
    finally:
        receiver.close()
    return failure or (Failure(stage, reason(process.exitcode)) if process.exitcode else None)


def reason(code: int) -> str:
    """How a process ended that could not say so itself."""
    if code >= 0:
        return f"exit code {code}"
    hint = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"


def _listen(receiver: Connection, process: Any, stage: str, listener: Listener) -> tuple[str, Failure | None]:
    """Pass the messages on until the process ends: the last stage that began, and its failure."""
    # Waiting for the process too: what it has started may hold the pipe open beyond its end.
    while receiver in wait([receiver, process.sentinel]):
        try:
            message: Message = receiver.recv()
        except (EOFError, OSError):  # the end, or killed in the middle of a message
            break
        if isinstance(message, Failure):
            return stage, message
        if isinstance(message, str):
            stage = message
            listener.stage(stage)
        else:
            listener.advance(*message)
    return stage, None


def _end(process: Any) -> None:
    process.terminate()
    process.join(PATIENCE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()


def _work(stages: Sequence[Stage], folder: Path, log: Path, sender: Connection) -> None:
    """What the process does. Raises: SystemExit, when a stage fails."""
    _leave_the_terminal(log)
    leave_out_noise()
    set_up_logging()
    Counting.report = _Reporter(sender)
    for stage in stages:
        keywords = getattr(stage.work, "keywords", {})
        print(f"== {stage.name}", *(f"{name}={value}" for name, value in keywords.items()), file=sys.stderr)
        sender.send(stage.name)
        try:
            result = json.dumps(stage.work(), indent=1)
            write_file(stage.kept(folder), result + "\n")
        except Exception as error:
            sentence = _sentence(error)
            print(f"slimtune: {sentence}", file=sys.stderr)
            sender.send(Failure(stage.name, sentence))
            sys.exit(1)
        _free_memory()


def _leave_the_terminal(log: Path) -> None:
    """Print to the log, hear no Ctrl-C, and end with the parent: else it would compete with the run that goes on."""
    # Tables in a log have no terminal to take their width from; tokenizers warns of every fork after it ran in threads.
    os.environ |= {"COLUMNS": "200", "TOKENIZERS_PARALLELISM": "false"}
    # A session of its own, since a terminal sends Ctrl-C to all processes of its session's foreground group.
    if hasattr(os, "setsid"):
        os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if sys.platform == "linux":
        prctl_set_death_signal = 1
        ctypes.CDLL(None).prctl(prctl_set_death_signal, signal.SIGTERM)
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:
            sys.exit(1)  # it ended before that was set


class _Reporter:
    """Sends progress on, not more often than a person can follow."""

    def __init__(self, sender: Connection) -> None:
        self.sender, self.last = sender, float("-inf")

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        # The last report always goes out, so that no stage seems to end short of its total.
        if done >= total or now - self.last > REPORT_SECONDS:
            self.sender.send((done, total))
            self.last = now


def _sentence(error: Exception) -> str:
    """What an error means to a user; the traceback of one that is nobody's mistake goes to the log."""
    sentence = sentence_of(error)
    if sentence is None or not isinstance(error, SlimtuneError | OSError):
        traceback.print_exception(error)
    return sentence or traceback.format_exception_only(error)[-1].strip()


def _free_memory() -> None:
    """The model of a stage must not stand beside that of the next one."""
    # Models refer to themselves through hooks, so that they aren't freed by count alone.
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
