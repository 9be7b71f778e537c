"""Integer grids: a weight as whole numbers times a scale for each group of inputs, and the scales that lose least.

    w = code * scale of its group,  code in [-2^(bits-1), 2^(bits-1) - 1]

There are no zero points. A scale may be negative, which lays the one code that has no opposite (-8 of 4 bits) on the
side of the group's largest entry: llama.cpp's Q4_0 does the same. Shapes: weight (out, in), scales (out, groups), where
group g holds the inputs [g * size, (g + 1) * size).
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16
"""What scales are stored in."""
CLIPS = tuple(1 - 0.04 * step for step in range(13))
"""Shares of the largest entry that the range search tries, 1 to 0.52."""
_ROWS = 1 << 21
"""How many weights are searched at once: the candidates of more would leave the caches."""


def code_range(bits: int) -> tuple[int, int]:
    """The smallest and the largest code: (-8, 7) of 4 bits."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


def extreme_scales(weight_OI: Tensor, group_size: int, bits: int) -> Tensor:
    """Scales (out, groups) in float32 that lay each group's largest entry, with its sign, on the lowest code."""
    groups_OGS = _grouped(weight_OI, group_size)
    largest = groups_OGS.gather(-1, groups_OGS.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return largest / code_range(bits)[0]


def symmetric_scales(weight_OI: Tensor, group_size: int, bits: int) -> Tensor:
    """Positive scales (out, groups) in float32 that lay each group's largest magnitude on the highest code."""
    return _grouped(weight_OI, group_size).abs().amax(-1) / code_range(bits)[1]


def nearest_codes(weight_OI: Tensor, scales_OG: Tensor, bits: int) -> Tensor:
    """The nearest code of each entry, int8 (out, in), clipped to the range; scales as they are stored."""
    groups_OGS = _grouped(weight_OI, weight_OI.shape[1] // scales_OG.shape[1])
    codes = (groups_OGS / _divisors(scales_OG)).round_().clamp_(*code_range(bits))
    return codes.to(torch.int8).view(weight_OI.shape)


def expand(codes_OI: Tensor, scales_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """code * scale, (out, in)."""
    groups_OGS = codes_OI.to(dtype).view(codes_OI.shape[0], scales_OG.shape[1], -1)
    return groups_OGS.mul_(scales_OG.to(dtype).unsqueeze(-1)).view(codes_OI.shape)


@torch.no_grad()
def searched_scales(weight_OI: Tensor, group_size: int, bits: int, importance_I: Tensor | None = None) -> Tensor:
    """Scales (out, groups), as stored, with the least error that clipping and then least squares reach.

    The error of a group is sum_i h_i (w_i - code_i scale)^2 with h the importance of its inputs, E[x_i^2] where
    activations are known and 1 otherwise. Clipping gives up the largest entries for a finer grid of the others; for the
    codes of the best range the best scale then has a closed form, <w h code> / <code h code>.
    """
    rows = max(1, _ROWS // weight_OI.shape[1])
    found = [_searched(piece, group_size, bits, importance_I) for piece in weight_OI.split(rows)]
    return torch.cat(found)


def _searched(weight_OI: Tensor, group_size: int, bits: int, importance_I: Tensor | None) -> Tensor:
    weight_OI = weight_OI.float()
    groups_OGS = _grouped(weight_OI, group_size)
    h_GS = torch.ones(groups_OGS.shape[1:], device=weight_OI.device)
    if importance_I is not None:
        h_GS = importance_I.to(weight_OI.device, torch.float32).view(h_GS.shape)
    whole = extreme_scales(weight_OI, group_size, bits)
    best, least = whole.to(SCALE_DTYPE), torch.full_like(whole, torch.inf)
    # In 8 bits the grid is fine enough that clipping gains nothing.
    for clip in CLIPS if bits < 8 else CLIPS[:1]:
        scales = (whole * clip).to(SCALE_DTYPE)
        for _ in range(2):
            codes = (groups_OGS / _divisors(scales)).round_().clamp_(*code_range(bits))
            error = (codes * scales.float().unsqueeze(-1) - groups_OGS).square_().mul_(h_GS).sum(-1)
            better = error < least
            best, least = torch.where(better, scales, best), torch.where(better, error, least)
            # Least squares for these codes; a group of zeros keeps its scale.
            weighted = codes * h_GS
            fitted = (weighted * groups_OGS).sum(-1) / (weighted * codes).sum(-1)
            scales = torch.where(fitted.isfinite() & (fitted != 0), fitted, scales.float()).to(SCALE_DTYPE)
    return best


def _grouped(weight_OI: Tensor, group_size: int) -> Tensor:
    return weight_OI.float().reshape(weight_OI.shape[0], -1, group_size)


def _divisors(scales_OG: Tensor) -> Tensor:
    """The scales in float32, (out, groups, 1), with 1 for those of groups of zeros, whose codes are zeros anyway."""
    scales = scales_OG.float()
    return torch.where(scales == 0, 1.0, scales).unsqueeze(-1)


def pack_nibbles(codes_OI: Tensor) -> Tensor:
    """4-bit codes (out, in) as int32 (out, ceil(in / 8)), eight a number, the first lowest, each code plus 8.

    That is how compressed-tensors stores them. Inputs beyond the last stand as zero bits.
    """
    pairs = torch.nn.functional.pad(codes_OI + 8, (0, -codes_OI.shape[1] % 8)).to(torch.uint8)
    return (pairs[:, ::2] | pairs[:, 1::2] << 4).contiguous().view(torch.int32)


def unpack_nibbles(packed: Tensor, inputs: int) -> Tensor:
    """The inverse of `pack_nibbles`: int8 codes (out, in)."""
    octets = packed.contiguous().view(torch.uint8)
    codes = torch.stack([octets & 0xF, octets >> 4], dim=-1).view(packed.shape[0], -1)
    return codes[:, :inputs].to(torch.int8).sub_(8)
