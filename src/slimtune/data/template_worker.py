"""The process in which `template_process` has chat templates rendered, and which that ends when it takes too much.

It is run by its path, for importing it as a module would import the library. A request is eight bytes of length and a
pickle, from the library; an answer is the same with JSON, for what a stranger's template made is not to be unpickled.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

CHARACTERS = 2**25
"""Of the rendered text."""


def main() -> None:
    """Answer requests until there are no more."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # Whatever a library prints must not get among the answers.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from transformers.utils.chat_template_utils import render_jinja_template

    seconds, size = float(sys.argv[1]), int(sys.argv[2])
    _limit_memory(size)
    answers.write(b"\n")
    answers.flush()
    while length := requests.read(8):
        request = pickle.loads(requests.read(int.from_bytes(length, "little")))
        if hasattr(signal, "setitimer"):
            # For when whoever watches is killed: its signal ends the process, within one long operation too.
            signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = json.dumps(_answer(render_jinja_template, request)).encode()
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(len(answer).to_bytes(8, "little") + answer)
        answers.flush()


def _answer(render: Any, request: dict[str, Any]) -> dict[str, str]:
    """What a request gives: its text, or what is wrong with the template."""
    from jinja2 import TemplateError

    try:
        text = render(**request)[0][0]
        if len(text) > CHARACTERS:
            return {"excess": f"it writes more than {CHARACTERS:,} characters"}
        return {"text": text}
    except MemoryError:
        return {"excess": f"it takes more than {int(sys.argv[2]) // 2**20} MB of memory"}
    except TemplateError as error:
        return {"error": str(error)[:1000] or type(error).__name__}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:1000]}"}


def _limit_memory(size: int) -> None:
    """Have Linux refuse what is too much at once.

    Whoever watches looks every few milliseconds, in which a single operation can take gigabytes. Other systems count
    address space in other ways or not at all.
    """
    if sys.platform != "linux":
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    # What the process has mapped when it is ready, libraries included, and room for the work on top.
    most = pages * resource.getpagesize() + size
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main()
