"""The machine: which device and dtype a model is computed in, and how much memory there is."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from slimtune.errors import ConfigError, first_line, listing

DTYPES = ("auto", "bfloat16", "float16", "float32")


def pick_device(device: str) -> str:
    """The device meant by `auto` (CUDA, then Apple's, then the CPU); raises ConfigError for one that isn't here."""
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        # The only way to know that a device works: "cuda:7" parses everywhere.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
        ways = " or ".join(["auto", *here])
        # Of a name that it doesn't know torch lists twenty that nobody here means.
        is_known = not str(error).startswith("Expected one of")
        why = first_line(error) if is_known else "NVIDIA's and AMD's GPUs are called cuda, Apple's mps"
        raise ConfigError(f"no device '{device}' here: {why}; pass {ways}") from error
    return device


def native_dtype(device: str = "auto") -> str:
    """The 16-bit dtype that a device computes in by itself, or float32."""
    import torch

    if pick_device(device).startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return "bfloat16" if "bfloat16" in cpu_dtypes(_cpuinfo()) else "float32"


def computing_dtype(stored: str | None, device: str, native: Collection[str] | None = None) -> str:
    """What the dtype `auto` is for a model that trains or answers: float32 where 16 bits are emulated, else `auto`.

    Args:
        stored: the dtype that the model's configuration names.
        device: of torch's, such as cpu or cuda:1.
        native: 16-bit dtypes that the processor computes in by itself; None for this machine's.
    """
    # A configuration that names no dtype may lie beside weights of 16 bits.
    return "float32" if is_emulated(stored or "bfloat16", device, native) else "auto"


def is_emulated(dtype: str, device: str, native: Collection[str] | None = None) -> bool:
    """Whether a device computes in a 16-bit dtype only by way of float32; arguments as of `computing_dtype`.

    A training step is then ten times slower than in float32: `python -m benchmarks.dtypes`.
    """
    if dtype not in ("bfloat16", "float16") or device.partition(":")[0] != "cpu":
        return False
    return dtype not in (cpu_dtypes(_cpuinfo()) if native is None else native)


def reason_for_float32(stored: str) -> str:
    """What people are told where `auto` is float32 for a model that is stored in 16 bits."""
    return f"float32, for this processor only emulates {stored}"


def cost_of_emulation(dtypes: Sequence[str]) -> str:
    """What people are told where a model computes in 16 bits all the same."""
    return (
        f"this processor only emulates {listing(dtypes)}: with model.dtype=float32 a step is several times faster, and "
        "the base takes twice the memory"
    )


_UNITS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}
"""What Linux calls the instructions that multiply in a dtype, on x86 and on ARM."""


def cpu_dtypes(cpuinfo: str) -> set[str]:
    """The 16-bit dtypes that a processor computes in by itself, by what /proc/cpuinfo says of it."""
    flags = set(cpuinfo.split())
    return {dtype for dtype, units in _UNITS.items() if flags & units}


@cache
def _cpuinfo() -> str:
    # Other systems have no such file: float32 is never far behind there.
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


class Ram(NamedTuple):
    """The machine's memory in bytes, whatever a container may have of it."""

    total: int
    free: int
    """Used by nothing, not even as a cache of files."""
    available: int
    """What programs can have: free, or a cache that gives way."""


def ram() -> Ram | None:
    """The memory of this machine; None where the system doesn't tell."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    free = page * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else total
    info = Path("/proc/meminfo")
    if not info.is_file():
        return Ram(total, free, total)
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    # `MemAvailable` is the kernel's own estimate, in kiB; free alone leaves caches out, which give way.
    return Ram(total, free, int(lines["MemAvailable"].split()[0]) * 1024)
