"""The commands of one run, one after the other in one process: libraries are imported once.

    python -m slimtune.cli.compare_worker FOLDER '[["train", ...], ["evaluate", ...]]'

What a command prints as JSON is kept as FOLDER/COMMAND.json as soon as it is done. The training comes first, so that
the peak of the process's memory is its own. The first command that fails ends the process with its exit code.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from slimtune.storage.atomic import staged_file

BEGINS = "$ slimtune "
"""In front of a command, where it begins in the log."""


def main(folder: Path, commands: Sequence[Sequence[str]]) -> int:
    """The exit code of the first command that fails, or 0."""
    for command in commands:
        print(f"{BEGINS}{shlex.join(command)}", file=sys.stderr, flush=True)
        code, printed = _call(command)
        if code:
            return code
        try:
            found = json.loads(printed.strip().splitlines()[-1])
        except (ValueError, IndexError):
            print(f"slimtune: {command[0]} printed no JSON, but {printed[-200:]!r}", file=sys.stderr)
            return 1
        with staged_file(folder / f"{command[0]}.json") as scratch:
            scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        _give_back_memory()
    return 0


def _call(command: Sequence[str]) -> tuple[int, str]:
    """The exit code of a command of slimtune, and what it prints."""
    from slimtune.cli import app

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            app(list(command), prog_name="slimtune")
    except SystemExit as end:
        return (end.code if isinstance(end.code, int) else int(end.code is not None)), printed.getvalue()
    return 0, printed.getvalue()


def _give_back_memory() -> None:
    """The model of a command must not stand beside that of the next one."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
