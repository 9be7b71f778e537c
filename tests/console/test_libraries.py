"""How a process of slimtune's own imports its libraries."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys

import pytest

from slimtune.console.libraries import importing

IMPORTING = """
import sys
from slimtune.console import libraries
{own}
with libraries.importing("datasets"):
    import transformers.trainer
there = [name for name in ("peft", "datasets") if name in sys.modules]
from transformers.utils import is_datasets_available, is_peft_available
import peft, datasets
print(there, is_peft_available(), is_datasets_available(), peft.PeftModel.__name__, datasets.Dataset.__name__)
"""


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        # What transformers wasn't to find is there for everybody else.
        ("libraries.own_process()", "[] False False PeftModel Dataset"),
        ("", "['peft', 'datasets'] True True PeftModel Dataset"),
        # Where somebody uses it, transformers does, too.
        ("libraries.own_process(); import peft", "['peft'] True False PeftModel Dataset"),
    ],
)
def test_transformers_finds_what_a_command_uses(own: str, expected: str) -> None:
    program = IMPORTING.format(own=own)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_garbage_waits_until_all_is_imported() -> None:
    frozen = gc.get_freeze_count()
    try:
        with importing(transformers=False):
            assert not gc.isenabled()
            made = [[] for _ in range(1000)]
        assert gc.isenabled()
        # Left alone by later collections.
        assert gc.get_freeze_count() >= len(made)
    finally:
        if not frozen:
            gc.unfreeze()


GROWING = """
import ctypes
from slimtune.console import libraries
{own}
import torch

class Heap(ctypes.Structure):
    names = "arena ordblks smblks hblks mapped usmblks fsmblks used fordblks keepcost".split()
    _fields_ = [(name, ctypes.c_size_t) for name in names]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap
weight, out = torch.ones(64, 64, dtype=torch.bfloat16), torch.empty(900, 64, dtype=torch.bfloat16)

def used(shapes):
    for rows in shapes:
        torch.mm(out[:rows], weight, out=out[:rows])
    heap = libc.mallinfo2()
    return heap.used + heap.mapped

before = used(range(1, 10))
print(used(range(10, 800)) - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc tells how much of its heap is used")
def test_a_process_of_its_own_keeps_few_prepared_products() -> None:
    grown = []
    for own in ("", "libraries.own_process()"):
        done = subprocess.run(
            [sys.executable, "-c", GROWING.format(own=own)], capture_output=True, text=True, check=True
        )
        grown.append(int(done.stdout))
    if grown[0] < 2**20:
        pytest.skip("this processor's products are not prepared")
    assert grown[1] < grown[0] / 2
