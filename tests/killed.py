"""Runs of the command line in processes of their own, that are killed in the middle of what they do."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, for a process of each run would take seconds to load them.
_CONTEXT.set_forkserver_preload(["torch", "transformers", "slimtune.pipeline.train", "slimtune.cli"])


def command(arguments: list[str], screen: str) -> None:
    """What such a process runs: `slimtune ARGUMENTS`, with what it says in the file `screen`."""
    import torch

    from slimtune.cli import app

    torch.set_num_threads(1)
    file = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    app(arguments)


def start(*arguments: Any, screen: Path) -> Any:
    """The process, under way."""
    process = _CONTEXT.Process(target=command, args=([str(argument) for argument in arguments], str(screen)))
    process.start()
    return process


def finish(*arguments: Any, screen: Path) -> None:
    """Run it to its end, which must be a good one."""
    process = start(*arguments, screen=screen)
    process.join(60)
    assert process.exitcode == 0, screen.read_text()


def kill_when(process: Any, moment: Callable[[], Any], delay: float = 0.0, number: int = signal.SIGKILL) -> int:
    """Kill it as soon as the moment has come and the delay has passed; gives back how it ended."""
    _wait(process.is_alive, moment)
    time.sleep(delay)
    os.kill(process.pid, number)
    process.join(60)
    return process.exitcode


def kill_process(process: subprocess.Popen[Any], moment: Callable[[], Any], number: int) -> int:
    """The same for a process that was started by itself."""
    _wait(lambda: process.poll() is None, moment)
    process.send_signal(number)
    return process.wait(60)


def _wait(alive: Callable[[], Any], moment: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while alive() and not moment() and time.monotonic() < end:
        time.sleep(0.001)


@contextmanager
def holding(code: str, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs this code with the output as its argument, as soon as it has printed "there"."""
    process = subprocess.Popen([sys.executable, "-c", code, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"there\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def lines(path: Path) -> int:
    """How many lines a file has that may not be there yet."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
