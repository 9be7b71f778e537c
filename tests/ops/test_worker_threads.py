"""Workers of a thread's products end when they are let go, as an engine does for whoever starts it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

START = """
import os, threading, time
import torch

torch.set_num_threads(4)
numbers = torch.randn(1024, 1024)

def threads():
    return len(os.listdir("/proc/self/task"))

def settled(count):
    for _ in range(100):
        if threads() == count:
            return count
        time.sleep(0.05)
    return threads()
"""
RELEASED = """
from slimtune.ops.worker_threads import release_worker_threads
before = threads()
numbers @ numbers
between = threads()
release_worker_threads()
print(between - before, settled(before) - before)
numbers @ numbers
"""
STARTED = """
import slimtune
from small_text_model import tiny_model, tiny_tokenizer
before = threads()
engine = slimtune.Engine(tiny_model().eval(), tiny_tokenizer(), slots=1, context=32)
numbers @ numbers
between = threads()
engine.start()
print(between - before, settled(before + 1) - before - 1)
engine.stop()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP alone is told")
@pytest.mark.parametrize("script", [RELEASED, STARTED], ids=["released", "an engine starts"])
def test_workers_end(script: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", START + script], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    began, left = map(int, done.stdout.split())
    assert began > 0
    assert left == 0
