"""Where a model is computed and in which numbers: what is asked for, and what this machine does by itself."""

from __future__ import annotations

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
