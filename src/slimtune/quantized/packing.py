"""A weight as the codes of bitsandbytes, equal to its own bit for bit, a piece at a time.

Whole, a weight takes ten times its size on a CPU while it is quantized, and more time.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import QuantState, get_4bit_type, int8_vectorwise_quant, quantize_blockwise
from bitsandbytes.nn.modules import Int8Params, Params4bit
from torch import Tensor

PIECE = 1 << 17
"""How many weights are quantized at once on a CPU: what that takes stays in its cache. A multiple of all blocks."""
_LEAST = 1e-38
"""What the magnitude of a block of zeros is taken for, in bitsandbytes."""
_NESTED_BLOCK = 256
"""How many scales share a scale in double quantization, in bitsandbytes."""


def packed_4bit(
    weight_OI: Tensor, blocksize: int, kind: str, double: bool, storage: torch.dtype, module: Any = None
) -> Params4bit:
    """What bitsandbytes' `quantize_4bit` gives for any shape; the state is noted in the module as well."""
    pieces = weight_OI.reshape(-1).split(PIECE if weight_OI.device.type == "cpu" else weight_OI.numel())
    packed, maxima = zip(*(_packed_piece(piece, blocksize, kind, storage) for piece in pieces), strict=True)
    absmax, nested = torch.cat(maxima), {}
    if double:
        offset = absmax.mean()
        absmax, state2 = quantize_blockwise(absmax - offset, blocksize=_NESTED_BLOCK)
        nested = {"offset": offset, "state2": state2}
    state = QuantState(
        absmax, weight_OI.shape, get_4bit_type(kind, weight_OI.device), blocksize, kind, weight_OI.dtype, **nested
    )
    if module is not None:
        module.quant_state = state
    parameter: Any = Params4bit
    return parameter(torch.cat(packed), False, state, blocksize, double, kind, storage, module, bnb_quantized=True)


def _packed_piece(piece: Tensor, blocksize: int, kind: str, storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """The codes of some weights, two a byte, and the largest magnitude of each block."""
    if piece.device.type == "cpu" and piece.numel() % blocksize == 0:
        # bitsandbytes looks each weight up by bisection there; to count the midpoints below it takes half of the time.
        blocks = piece.to(torch.float32, copy=True).view(-1, blocksize)
        absmax = torch.maximum(blocks.amax(-1), -blocks.amin(-1)).abs()
        if absmax.isfinite().all():
            scaled = blocks.mul_((1.0 / absmax.clamp(min=_LEAST)).unsqueeze(-1)).clamp_(-1, 1).view(-1)
            codes = _nearest(scaled, get_4bit_type(kind, piece.device))
            return ((codes[::2] << 4) | codes[1::2]).view(storage).unsqueeze(1), absmax
    return torch.ops.bitsandbytes.quantize_4bit.default(piece, blocksize, kind, storage)


def _nearest(scaled: Tensor, codebook: Tensor) -> Tensor:
    """The code of the nearest value for each number; the lower value where two are as near."""
    order = codebook.argsort()
    midpoints = (codebook[order[:-1]] + codebook[order[1:]]) / 2
    # Up to the code of a value from that of the one below, which in FP4 may be larger: bytes count round.
    steps = order.diff() % 256
    codes = torch.full(scaled.shape, int(order[0]), dtype=torch.uint8)
    above = torch.empty(scaled.shape, dtype=torch.bool)
    for midpoint, step in zip(midpoints.tolist(), steps.tolist(), strict=True):
        codes.add_(torch.gt(scaled, midpoint, out=above).view(torch.uint8), alpha=step)
    return codes


def packed_8bit(weight_OI: Tensor) -> Int8Params:
    """What bitsandbytes' `Int8Params` makes of a weight: codes by way of float16, and a scale a row."""
    rows = max(1, PIECE // weight_OI.shape[1]) if weight_OI.device.type == "cpu" else weight_OI.shape[0]
    pieces = [int8_vectorwise_quant(piece.contiguous().half())[:2] for piece in weight_OI.split(rows)]
    codes, scales = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    parameter: Any = Int8Params
    return parameter(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
