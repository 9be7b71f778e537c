"""Programs of others that write a format: found on the PATH, run to their end, and quoted where they fail."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from slimtune.errors import MergeError


def run_program(command: Sequence[str], name: str) -> None:
    """Run a command. Raises: MergeError, with the last line that it wrote."""
    # What is in ours must not be found first by a Python with packages of its own.
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=outside)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["without a word"]
        raise MergeError(f"{name} failed (exit code {done.returncode}): {lines[-1]}")
