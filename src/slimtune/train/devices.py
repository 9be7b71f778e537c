"""The one device that a run is on, where there are several."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from slimtune.errors import ConfigError


def check_device(device: str) -> str:
    """The kind of a device that can train, such as "cuda". Raises: ConfigError, for a GPU but the first visible one."""
    kind, _, number = device.partition(":")
    if kind == "cuda" and number not in ("", "0"):
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        its_name = named[int(number)] if int(number) < len(named) else number
        raise ConfigError(
            f"transformers' Trainer takes the first GPU that is visible, not {device}; set "
            f"CUDA_VISIBLE_DEVICES={its_name or number} and pass cuda"
        )
    return kind


def keep_to_one(arguments: Any, say: Callable[[str], None]) -> Any:
    """The arguments of a Trainer with one GPU: it would copy the model to all that are visible, at each step anew.

    A batch would then be as many times larger as there are GPUs, without a word.
    """
    if arguments.n_gpu > 1:
        say(f"{arguments.n_gpu} GPUs are visible, of which {arguments.device} trains; CUDA_VISIBLE_DEVICES chooses")
        arguments._n_gpu = 1
    return arguments
