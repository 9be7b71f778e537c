"""Chat templates, which are programs that anybody may have written, rendered in a process that can be ended.

transformers renders them in a sandbox, which keeps them from files and from code, and not from time and memory: a loop
in a loop, a text times a number, a list of itself in itself. What bounds all of it alike is a process: one is started
by the first conversation at the latest, takes one after the other, and ends with this one. Any number of threads may
use it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

_WORKER = Path(__file__).with_name("template_worker.py")
SECONDS = 10
"""Of the processor, for one conversation; a real template takes a thousandth of a second."""
BYTES = 2**29
"""Of memory, beyond what the process has when it is ready."""
INTERVAL = 0.01
"""Seconds between two looks at what the process takes."""


class TemplateError(Exception):
    """A template that can't be rendered, with the reason; `is_excess` where it takes too much of something."""

    def __init__(self, reason: str, is_excess: bool = False) -> None:
        super().__init__(reason)
        self.is_excess = is_excess


def render(tokenizer: Any, messages: Sequence[Any], tools: Sequence[Any] | None, for_answer: bool) -> str:
    """A conversation as `tokenizer.apply_chat_template` renders it. Raises: TemplateError."""
    from transformers import PreTrainedTokenizerBase

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        # A tokenizer with code of its own is trusted, and has no template that anything else could render.
        return _by_itself(tokenizer, messages, tools, for_answer)
    try:
        template = tokenizer.get_chat_template(None, tools)
        # As `apply_chat_template` prepares them.
        present = [{name: value for name, value in turn.items() if value is not None} for turn in messages]
        request = dict(tokenizer.special_tokens_map) | {
            "conversations": [present], "tools": list(tools) if tools else None, "chat_template": template,
            "add_generation_prompt": for_answer,
        }  # fmt: skip
        # Pickled here and read by our own worker: whatever a turn holds goes over as it is, dates included.
        data = pickle.dumps(request)
    except (TypeError, ValueError, AttributeError, pickle.PicklingError) as error:
        raise TemplateError(str(error)) from error
    answer = _PROCESS.ask(data)
    if "text" not in answer:
        raise TemplateError(answer.get("excess") or answer["error"], "excess" in answer)
    return answer["text"]


def _by_itself(tokenizer: Any, messages: Sequence[Any], tools: Sequence[Any] | None, for_answer: bool) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=for_answer
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise TemplateError(str(error)) from error


class _Watched:
    """A process that renders, ended by a thread of this one when it takes too much for one conversation.

    From outside, and not by limits of its own alone: those of memory differ by system, and Windows has none of either.
    A thread inside would have to wait for the interpreter, which one long operation on a number holds until its end.
    """

    def __init__(self) -> None:
        self.process, self.is_ready = _start(), False
        self.seen = psutil.Process(self.process.pid)
        self.excess, self.bytes = "", 0
        self.since: float | None = None
        """Seconds of the processor that it had taken when the conversation came; None while it is idle."""
        self.changed = threading.Condition()
        threading.Thread(target=self._watch, daemon=True).start()

    def begin(self) -> None:
        """A conversation goes to it."""
        assert self.process.stdout
        if not self.is_ready:
            # It writes one byte when its libraries are there, whose memory and time aren't the template's.
            self.process.stdout.read(1)
            self.is_ready = True
        with self.changed, contextlib.suppress(psutil.Error):
            self.since, self.bytes = self._seconds(), self.bytes or self.seen.memory_info().rss
            self.changed.notify()

    def rest(self) -> None:
        """Its answer is there."""
        with self.changed:
            self.since = None

    def end(self) -> None:
        """End it, and the thread with it."""
        self.process.kill()
        self.process.communicate()
        with self.changed:
            self.changed.notify()

    def _watch(self) -> None:
        # A process that is gone ends the thread.
        with contextlib.suppress(psutil.Error):
            while self.process.returncode is None and not self.excess:
                # Under the lock: what ends it must be what this conversation took, and not one before.
                with self.changed:
                    # Asleep while it is idle.
                    self.changed.wait_for(lambda: self.since is not None or self.process.returncode is not None)
                    self.excess = self._excess()
                    if self.excess:
                        self.process.kill()
                time.sleep(INTERVAL)

    def _excess(self) -> str:
        if self.since is None:
            return ""
        if self._seconds() - self.since > SECONDS:
            return f"it takes longer than {SECONDS} s"
        is_large = self.seen.memory_info().rss - self.bytes > BYTES
        return f"it takes more than {BYTES // 2**20} MB of memory" if is_large else ""

    def _seconds(self) -> float:
        times = self.seen.cpu_times()
        return times.user + times.system


class _Process:
    """The process that renders, started when it is needed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: _Watched | None = None

    def prepare(self) -> None:
        """Start it, and don't wait until its libraries are there."""
        with self.lock:
            self.running = self.running or _Watched()

    def ask(self, request: bytes) -> dict[str, str]:
        """The answer to a request, as `template_worker` gives it; "excess" too where the process came to its end."""
        # One at a time: a pipe has no way to tell whose answer comes out.
        with self.lock:
            watched = self.running = self.running or _Watched()
            process = watched.process
            assert process.stdin
            assert process.stdout
            watched.begin()
            try:
                process.stdin.write(len(request).to_bytes(8, "little") + request)
                process.stdin.flush()
                # Blocks until the answer is there; a process that was ended closes the pipe, which reads as nothing.
                length = process.stdout.read(8)
                data = process.stdout.read(int.from_bytes(length, "little")) if length else b""
            except BrokenPipeError:
                data = b""
            except BaseException:
                # Its answer would be taken for that of the next request.
                self._end()
                raise
            watched.rest()
            ended = f"the process that rendered it ended with {process.wait()}" if not data else ""
            answer = json.loads(data) if data else {"excess": watched.excess or ended}
            # It may have been ended with its answer just given.
            if "excess" in answer or watched.excess:
                self._end()
            return answer

    def _end(self) -> None:
        if self.running is not None:
            self.running.end()
            self.running = None

    def end(self) -> None:
        """End the process with this one, whoever still waits for it."""
        with contextlib.suppress(OSError, ValueError):
            self._end()

    def forget(self) -> None:
        """Leave the process to the one that this was forked from."""
        # A new lock: the old one may be held by a thread that the fork didn't take along.
        self.lock, self.running = threading.Lock(), None


def _start() -> subprocess.Popen[bytes]:
    # A group of its own, so that Ctrl-C is a matter of this process alone.
    apart: dict[str, Any] = {"process_group": 0} if os.name == "posix" else {}
    started: Any = subprocess.Popen(
        [sys.executable, "-P", os.fspath(_WORKER), str(2 * SECONDS), str(BYTES)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        # One thread: Linux counts the stacks of others.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}, **apart,
    )  # fmt: skip
    return started


_PROCESS = _Process()


def prepare() -> None:
    """Start the process before the first conversation is there: it imports its libraries beside this one's."""
    _PROCESS.prepare()


def end() -> None:
    """End the process; the next conversation starts another one."""
    _PROCESS.end()


atexit.register(end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_PROCESS.forget)
