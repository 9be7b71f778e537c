"""Which programs read a folder: found out by loading it where they are installed, and else said by its format."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.adapters.merge import outputs
from slimtune.bases.integer import HoldsCodes
from slimtune.models.load import read_model_config
from slimtune.storage.compressed import ZERO
from slimtune.storage.source import no_weight_bar

_FAR = 0.1
"""How far another program's outputs may lie from ours, of their norm: rounding, and inputs rounded to 8 bits."""


@torch.no_grad()
def engines_of(folder: Path, model: Any, inputs: dict[str, Tensor]) -> list[str]:
    """The programs that loaded a folder and gave the same answers.

    Args:
        model: the folder as it was loaded here; its class is what transformers is asked for.
        inputs: on which the two are compared.
    """
    return ["slimtune", *_by_transformers(folder, model, inputs)]


def engines_by_format(model: Any) -> list[str]:
    """The programs that read such a folder by their own account, and weren't tried."""
    held: list[Any] = [module for module in model.modules() if isinstance(module, HoldsCodes)]
    # vLLM has no embedding in int8 and no Conv1D in codes, and its kernels for zero points are those of GPUs alone.
    ends = any(module.packed_base.kind == "embedding" or "source_cls" in vars(module) for module in held)
    is_plain = not ends and not any(ZERO in module._buffers for module in held)
    return ["vLLM (by its format, not tried)"] if is_plain and model.can_generate() else []


def _by_transformers(folder: Path, model: Any, inputs: dict[str, Tensor]) -> list[str]:
    """transformers, where it loads the folder without us and answers as we do."""
    import transformers

    from slimtune.models.load import class_of

    ours = outputs(model, inputs)
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    try:
        # compressed-tensors has progress bars of its own, which tell nothing here.
        with no_weight_bar(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            kind = class_of(read_model_config(str(folder)))
            theirs = kind.from_pretrained(folder, dtype=model.dtype, device_map={"": str(model.device)})
            got = outputs(theirs, inputs)
    except ImportError:
        return ["transformers (not tried: compressed-tensors isn't installed)"]
    except Exception:
        # Whatever another program fails with, it doesn't read the folder.
        return []
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    return ["transformers"] if (got - ours).norm() <= _FAR * ours.norm() else []
