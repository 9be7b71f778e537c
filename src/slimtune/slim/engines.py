"""Which programs read a folder: found out by loading it where they are installed, and else said by its format."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.adapters.merge import outputs
from slimtune.bases.integer import ZERO, HoldsCodes
from slimtune.models.load import read_model_config
from slimtune.storage.source import no_weight_bar

_FAR = 0.1
"""How far another program's outputs may lie from ours, of their norm: rounding, and inputs rounded to 8 bits."""


@torch.no_grad()
def engines_of(folder: Path, model: Any, inputs: dict[str, Tensor]) -> list[str]:
    """The programs that read a folder.

    Args:
        model: the folder as it was loaded here; its class is what transformers is asked for.
        inputs: on which the two are compared.
    """
    found = ["slimtune"]
    found += _by_transformers(folder, model, inputs)
    held = [module for module in model.modules() if isinstance(module, HoldsCodes)]
    ends = any(module.packed_base.kind == "embedding" or "source_cls" in vars(module) for module in held)
    # Of vLLM's rules: it has no embedding in int8, and its kernels for zero points are those of GPUs alone.
    if not ends and not any(ZERO in module._buffers for module in held) and model.can_generate():
        found.append("vLLM (by its format, not tried)")
    return found


def _by_transformers(folder: Path, model: Any, inputs: dict[str, Tensor]) -> list[str]:
    """transformers, where it loads the folder without us and answers as we do."""
    import transformers

    from slimtune.models.load import class_of

    ours = outputs(model, inputs)
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    try:
        with no_weight_bar(), warnings.catch_warnings():
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
