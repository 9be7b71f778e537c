"""Inputs that a generator damages by seed: no traceback, no hang, no 2 GB; `tests/fuzzing.py` says how to look further.

In a process of its own, which imports torch with one thread and forks a process for a handful of inputs at a time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "fuzzing.py"


def look(*options: object) -> None:
    command = [sys.executable, SCRIPT, *options]
    paths = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": paths}, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:]


def test_a_few_inputs_of_each_family() -> None:
    look("--seed", 0, "--count", 8)


@pytest.mark.soak
def test_new_inputs_for_ten_minutes() -> None:
    look("--seconds", 600)
