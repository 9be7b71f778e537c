"""Checkpoints of transformers' Trainer: the adapter alone, under a name that the Trainer looks for on resuming."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from slimtune.storage.peft_format import WEIGHTS_NAME

MODEL_NAME = "model.safetensors"


def is_checkpoint(folder: str | Path) -> bool:
    """Whether the Trainer names its checkpoints so."""
    return re.fullmatch(r"checkpoint-\d+", Path(folder).name) is not None


def offer_to_trainer(folder: str | Path, adapter_folder: str | Path) -> None:
    """Give the adapter's weights the second name that the Trainer reads a model's state dict from.

    It reads an adapter by its own name only for models of `peft`. A link takes no room; where the file system has
    none, the adapter is copied.
    """
    name, pending = Path(folder, MODEL_NAME), Path(folder, MODEL_NAME + ".new")
    pending.unlink(missing_ok=True)
    try:
        os.link(Path(adapter_folder, WEIGHTS_NAME), pending)
    except OSError:
        shutil.copyfile(Path(adapter_folder, WEIGHTS_NAME), pending)
    pending.replace(name)
