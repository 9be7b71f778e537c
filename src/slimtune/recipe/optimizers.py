"""Which optimizers `optim` may name, and what each needs to run: the names are those of transformers' Trainer."""

from __future__ import annotations

import os
import shutil

from slimtune.errors import ConfigError, TrainingError, did_you_mean, require

DEFAULT = "adamw_torch_fused"
OFFLOADED = "adamw_offload"
"""AdamW whose moments live in main memory; transformers has no name for one."""

BITSANDBYTES = (
    "adamw_8bit", "adamw_bnb_8bit", "ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit", "rmsprop_bnb",
    "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
)  # fmt: skip
PAGED = {
    "paged_adamw_32bit": DEFAULT,
    "paged_adamw_8bit": "adamw_8bit",
    "paged_ademamix_32bit": "ademamix",
    "paged_ademamix_8bit": "ademamix_8bit",
    "paged_lion_32bit": "lion_32bit",
    "paged_lion_8bit": "lion_8bit",
}
"""Those whose state moves between GPU and main memory, each with the one that does the same without moving."""
TORCHAO = ("adamw_torch_8bit", "adamw_torch_4bit")
OPTIMIZERS = (
    DEFAULT, "adamw_torch", "adafactor", "adagrad", "rmsprop", "sgd", *BITSANDBYTES, *PAGED, *TORCHAO, OFFLOADED,
)  # fmt: skip


def check_name(name: str) -> None:
    """Raises: ConfigError, for a name that isn't known, or that needs more than a name."""
    if name not in OPTIMIZERS:
        near = did_you_mean(name, OPTIMIZERS)
        raise ConfigError(f"no optimizer '{name}'; pass one of {', '.join(OPTIMIZERS)}{near}")


def check_installed(name: str) -> None:
    """See that the library of an optimizer is there. Raises: MissingDependencyError."""
    if name in (*BITSANDBYTES, *PAGED):
        require("bitsandbytes", extra="quantized", purpose=f"training.optim={name}")
    if name in TORCHAO:
        require("torchao", extra="torchao", purpose=f"training.optim={name}")


def check_runs(name: str, device: str) -> None:
    """See that an optimizer runs here for a model on this type of device ("cpu", "cuda", ...).

    Raises:
        MissingDependencyError: its library isn't installed.
        ConfigError: it is for another device.
        TrainingError: torchao compiles its step, and there is no compiler.
    """
    check_name(name)
    check_installed(name)
    key = f"training.optim={name}"
    if name in PAGED and device != "cuda":
        raise ConfigError(
            f"{key} moves its state between a CUDA device and main memory, and the model is on {device}; "
            f"pass training.optim={PAGED[name]}"
        )
    if name == OFFLOADED and device == "cpu":
        raise ConfigError(
            f"{key} would change nothing: the model is on the CPU, whose optimizers keep their state in main "
            f"memory anyway; pass training.optim={DEFAULT}, or adamw_8bit for a smaller state"
        )
    compiler = os.environ.get("CXX", "g++")
    if name in TORCHAO and device == "cpu" and shutil.which(compiler) is None:
        raise TrainingError(
            f"{key} compiles its step, and the compiler '{compiler}' is not here; install it, or pass "
            "training.optim=adamw_8bit"
        )
