"""What bitsandbytes stores: its reach, made anew from a weight, given up for a plain layer."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_blockwise
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slimtune.errors import MergeError
from slimtune.quantized.packing import packed_8bit

_OWN = (
    "compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu",
    "state", "index", "source_cls",
)  # fmt: skip
"""What bitsandbytes and transformers note in a quantized module."""


@torch.no_grad()
def pack_8bit(weight_OI: Tensor) -> Tensor:
    """int8 codes of a weight, each row scaled by its largest entry.

    Raises:
        MergeError: an entry is beyond float16, by way of which bitsandbytes quantizes.
    """
    largest = weight_OI.abs().max().item()
    if largest > torch.finfo(torch.float16).max:
        raise MergeError(
            f"the merged weight has an entry of {largest:.3g}, which bitsandbytes can't quantize to int8; merge into "
            "16 bits"
        )
    return packed_8bit(weight_OI)


def block_maxima(state: Any) -> Tensor:
    """The largest magnitude that each block of 4-bit codes reaches, in float32."""
    if not state.nested:
        return state.absmax.float()
    return dequantize_blockwise(state.absmax, state.state2).float().add_(state.offset)


def give_up_storage(module: Any, weight_OI: Tensor) -> None:
    """Make the module the plain one that it was before it was quantized: an `nn.Linear`, or GPT-2's `Conv1D`."""
    is_conv1d = issubclass(getattr(module, "source_cls", nn.Linear), Conv1D)
    for name in _OWN:
        module.__dict__.pop(name, None)
    hooks = module._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "__module__", "").startswith("bitsandbytes")]:
        del hooks[key]
    if is_conv1d:
        module.nx, module.nf = module.in_features, module.out_features
        del module.in_features, module.out_features
        weight_OI = weight_OI.t().contiguous()
    module.__class__ = Conv1D if is_conv1d else nn.Linear
    module._parameters["weight"] = nn.Parameter(weight_OI, requires_grad=False)
