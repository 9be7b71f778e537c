"""Memory that was freed between what stays is given back."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes
from slimtune.ops.freed_memory import return_freed_memory

def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

ctypes.CDLL(None).mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: as after a first large tensor was freed
freed, kept = [], []
for number in range(400):
    freed.append(bytearray(200_000))
    kept.append(bytearray(5_000))
del freed
before = resident()
return_freed_memory()
print(before, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc keeps what was freed")
def test_gaps_between_what_stays_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before - after > 60_000  # kB, of the 80,000 that were freed
