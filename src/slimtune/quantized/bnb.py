"""bitsandbytes' modules with our product, and the expansion of its codes.

Its own `Linear4bit.forward` is not used: on CPUs with AVX512-BF16 one evaluation repacks the weights in place, after
which training loses gradients without an error, and a model that is saved has lost the exact block maxima.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bitsandbytes.functional import QuantState, _convert_weight_packed_for_cpu_inverse
from bitsandbytes.nn.modules import Linear4bit as Stored4bit
from bitsandbytes.nn.modules import Linear8bitLt as Stored8bit
from torch import Tensor

from slimtune.bases.bnb import Bnb4bitLinear, Bnb8bitLinear, scales_of, state_of
from slimtune.bases.packed import Packed
from slimtune.quantized.bnb_storage import block_maxima
from slimtune.quantized.damage import check_4bit, check_8bit

_LARGEST_FAST_BLOCK = 1024
"""Beyond it bitsandbytes' kernel for the CPU is inexact where it uses AVX512."""


class Linear4bit(Packed, Stored4bit):
    """NF4 or FP4: what bitsandbytes stores, the product with the expanded weight."""

    packed_base = Bnb4bitLinear()

    def __setstate__(self, state: Any) -> None:
        """A copy: its codes lead to it, and not to the module that they were copied from, which that would keep."""
        super().__setstate__(state)
        if getattr(self.weight, "quant_state", None) is not None:
            self.packed_base.settle(self)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Codes come with the state that they mean something by, which bitsandbytes leaves behind."""
        begin = f"{prefix}weight."
        parts = {name: value for name, value in state_dict.items() if name.startswith(begin)}
        rest = {name: value for name, value in state_dict.items() if name not in parts}
        codes = rest.get(f"{prefix}weight")
        state: Any = QuantState.from_dict(parts, device=self.weight.device) if parts else None
        if codes is not None and self.packed_base.is_packed(self):
            if state is None:
                missing_keys.append(f"{begin}absmax")
                del rest[f"{prefix}weight"]
            elif tuple(state.shape) != (self.out_features, self.in_features):
                error_msgs.append(f"'{prefix}weight' is quantized from {tuple(state.shape)}, not from its shape here")
            elif codes.shape == self.weight.shape:
                self.weight.quant_state = state  # pyright: ignore[reportAttributeAccessIssue]
                self.quant_state = state
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


class Linear8bit(Packed, Stored8bit):
    """int8 with a scale a row: what bitsandbytes stores, the product with the expanded weight.

    The inputs are not quantized, unlike in bitsandbytes' own product.
    """

    packed_base = Bnb8bitLinear()


def adopt_storage(module: Any, dtype: torch.dtype) -> None:
    """Make one of bitsandbytes' modules ours in place; weights that an evaluation repacked are put back in order.

    Raises:
        DamagedBaseError: what is stored doesn't fit together.
    """
    if isinstance(module, Packed):
        return
    if isinstance(module, Stored4bit):
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            _unpack_cpu_format(module.weight, state)
        if Linear4bit.packed_base.is_packed(module) or not module.weight.is_floating_point():
            check_4bit(module, state_of(module))
        module.__class__ = Linear4bit
    else:
        if Linear8bit.packed_base.is_packed(module):
            check_8bit(module, scales_of(module))
        module.compute_dtype = dtype  # type: ignore[assignment]
        module.__class__ = Linear8bit


def _unpack_cpu_format(weight: Any, state: Any) -> None:
    """Undo the repacking that bitsandbytes does on CPUs; the block maxima stay rounded to bfloat16."""
    absmax = state.absmax.T.reshape(-1).float()
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    if not state.nested:
        # The inverse of bitsandbytes leaves them transposed.
        weight.quant_state.absmax = absmax


@torch.no_grad()
def expand_4bit(packed: Tensor, state: Any) -> Tensor:
    """The weight in the shape and dtype that it had before it was quantized, equal to bitsandbytes' bit for bit."""
    codes, absmax = packed.data, block_maxima(state)
    shape, size, dtype = tuple(state.shape), state.blocksize, state.dtype
    if codes.device.type != "cpu":
        return _kernel(codes, absmax, state, shape)
    # The kernel for the CPU takes each row to begin a block; as (blocks, block) that is true of any shape.
    count = math.prod(shape)
    whole = count // size if size <= _LARGEST_FAST_BLOCK else 0
    codes = codes.reshape(-1).view(torch.uint8)
    if whole * size == count:
        return _kernel(codes, absmax, state, (whole, size)).view(shape)
    head = _kernel(codes[: whole * size // 2], absmax[:whole], state, (whole, size)).view(-1) if whole else None
    tail = _looked_up(codes[whole * size // 2 :], absmax[whole:], state.code, size)[: count - whole * size].to(dtype)
    return (tail if head is None else torch.cat([head, tail])).view(shape)


def _kernel(codes: Tensor, absmax: Tensor, state: Any, shape: Sequence[int]) -> Tensor:
    return torch.ops.bitsandbytes.dequantize_4bit(
        codes, absmax, state.blocksize, state.quant_type, list(shape), state.dtype
    )


def _looked_up(codes: Tensor, absmax: Tensor, codebook: Tensor, size: int) -> Tensor:
    """codebook[code] * absmax of its block, in float32; the high half of a byte comes first."""
    pairs = torch.stack([codes >> 4, codes & 0xF], dim=1).reshape(-1).int()
    return codebook.float()[pairs] * absmax.repeat_interleave(size)[: pairs.numel()]


@torch.no_grad()
def expand_8bit(codes_OI: Tensor, scales_O: Tensor, dtype: torch.dtype) -> Tensor:
    """w = code * scale / 127 by rows, in bitsandbytes' order of rounding in float32."""
    return torch.mul(codes_OI.data, scales_O[:, None]).mul_(1 / 127).to(dtype)
