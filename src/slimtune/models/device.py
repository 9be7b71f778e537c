"""The machine: which device and dtype a model is computed in, and how much memory there is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from slimtune.errors import ConfigError, first_line

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


def native_dtype() -> str:
    """The 16-bit type that this machine computes in by itself, or float32."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    # Elsewhere bf16 is emulated and several times slower than float32.
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


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
