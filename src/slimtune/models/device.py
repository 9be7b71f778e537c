"""Where a model is computed and in which numbers: what is asked for, and what this machine does by itself."""

from __future__ import annotations

import os
from pathlib import Path

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
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"no device '{device}' here: {first_line(error)}; pass auto, cpu or cuda") from error
    return device


def native_dtype() -> str:
    """The 16-bit type that this machine computes in by itself, or float32."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    # Elsewhere bf16 is emulated and several times slower than float32.
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def available_memory() -> int:
    """Bytes of main memory that this process can still use: what the system has free, within a container's limit."""
    sizes = []
    info = Path("/proc/meminfo")
    if info.is_file():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        sizes.append(int(lines["MemAvailable"].split()[0]) * 1024)
    else:
        sizes.append(total_memory())
    # cgroups, version 2 and 1; "max" is no limit.
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(name).read_text().strip() if Path(name).is_file() else ""
        if limit.isdecimal():
            sizes.append(int(limit))
    return min(sizes)


def total_memory() -> int:
    """Bytes of main memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
