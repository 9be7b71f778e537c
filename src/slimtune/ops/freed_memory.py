"""Memory that was freed, and that the C library keeps for what may come."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import Any


def return_freed_memory() -> None:
    """Give back to the system what was freed: of a model in 4 bits, glibc keeps half its size after the first answer.

    Codes and what passes through memory while they are read or packed lie in turns, so that what is freed leaves gaps
    which nothing later fits into. Takes about a millisecond.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], Any] | None:
    # Other C libraries for Linux have no such function, and other systems no such library.
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
