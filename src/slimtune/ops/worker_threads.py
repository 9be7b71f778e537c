"""Threads that help with products, of which each thread that multiplies has its own."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

_SOFT = 1
"""Of `omp_pause_resource_all`: what was set stays."""


def release_worker_threads() -> None:
    """Let the workers of this thread's products go; its next product makes new ones, in a tenth of a millisecond.

    With more of them in the process than cores, GNU's OpenMP no longer lets any wait busily for the next product: each
    is put to sleep and woken, and another thread's products take up to a quarter longer. On other systems nothing
    happens.
    """
    pause = _pause()
    if pause is not None:
        pause(_SOFT)


@cache
def _pause() -> Callable[[int], Any] | None:
    if sys.platform != "linux":
        return None
    try:
        # The one that torch has loaded, which lies in its own folder.
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None
    return getattr(library, "omp_pause_resource_all", None)
