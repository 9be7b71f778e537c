"""Chat templates, which are programs that anybody may have written, rendered in a process that can be ended.

transformers renders them in a sandbox, which keeps them from files and from code, and not from time and memory: a loop
in a loop, a text times a number, a list of itself in itself. What bounds all of it alike is a process: one is started
with the first conversation, takes one after the other, and ends with this one. Any number of threads may use it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).with_name("template_worker.py")
SECONDS = 10
"""Of the processor, for one conversation; a real template takes a thousandth of a second."""


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


class _Process:
    """The process that renders, started when it is needed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> dict[str, str]:
        """The answer to a request, as `template_worker` gives it; "excess" too where the process came to its end."""
        # One at a time: a pipe has no way to tell whose answer comes out.
        with self.lock:
            process = self.running = self.running or _start()
            assert process.stdin
            assert process.stdout
            try:
                process.stdin.write(len(request).to_bytes(8, "little") + request)
                process.stdin.flush()
                # Blocks until the answer is there; a process that was ended by its limits closes the pipe, which reads
                # as nothing.
                length = process.stdout.read(8)
                data = process.stdout.read(int.from_bytes(length, "little")) if length else b""
            except BrokenPipeError:
                data = b""
            except BaseException:
                # Its answer would be taken for that of the next request.
                self._end()
                raise
            answer = json.loads(data) if data else {"excess": _why_ended(process.wait())}
            if "excess" in answer:
                self._end()
            return answer

    def _end(self) -> None:
        if self.running is not None:
            self.running.kill()
            self.running.communicate()
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
        [sys.executable, "-P", os.fspath(_WORKER), str(SECONDS)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        # One thread: the limit on memory counts the stacks of others.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}, **apart,
    )  # fmt: skip
    return started


def _why_ended(code: int) -> str:
    is_time = hasattr(signal, "SIGPROF") and code == -signal.SIGPROF
    return f"it takes longer than {SECONDS} s" if is_time else f"the process that rendered it ended with {code}"


_PROCESS = _Process()


def end() -> None:
    """End the process; the next conversation starts another one."""
    _PROCESS.end()


atexit.register(end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_PROCESS.forget)
