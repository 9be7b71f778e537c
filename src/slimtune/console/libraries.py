"""How a process of slimtune's own sets its libraries up: imported at once, without what it doesn't use, frugal.

A Trainer and a model are some 4,000 modules, which are most of the time before a first step.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("peft", "scipy")
"""What transformers imports wherever it is installed, and no command needs there: the adapters are ours, and scipy is
for losses of finding objects in pictures."""

KEPT_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}
"""How many products of different shapes oneDNN and torch keep prepared; by themselves they keep 1,024.

Each takes 0.6 MB in 16 bits, and a batch of another number of tokens is some 45 of them in training: with lengths that
vary, a run of any model grows by 0.6 GB. To prepare one takes less than a millisecond.
"""

_is_own = False


def own_process() -> None:
    """Say that nobody but slimtune's command line uses libraries in this process; before torch is imported."""
    global _is_own
    _is_own = True
    for name, value in KEPT_PRODUCTS.items():
        os.environ.setdefault(name, value)


@contextmanager
def importing(*unused: str, transformers: bool = True) -> Iterator[None]:
    """For the imports of a command.

    No garbage is collected meanwhile: what is made stays, and would be looked through again each time it has grown by a
    quarter. It is left alone afterwards, too.

    Args:
        unused: packages that the command doesn't need transformers to use, beside `UNUSED`.
        transformers: whether it is among what is imported.
    """
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        if transformers and _is_own:
            # What is imported already, somebody uses.
            _hide({*UNUSED, *unused} - sys.modules.keys())
        yield
    finally:
        if was_collecting:
            gc.freeze()
            gc.enable()


def _hide(packages: set[str]) -> None:
    """Ask transformers whether they are installed while they can't be found: it keeps the answer."""
    # What stands as None is found by nobody.
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]
    try:
        # It asks for some of them while it is imported.
        from transformers.utils import import_utils

        for name in packages:
            getattr(import_utils, f"is_{name}_available")()
    finally:
        for name in packages:
            del sys.modules[name]
