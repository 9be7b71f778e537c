"""Integer grids: a weight as whole numbers times a scale for each group of inputs, and the scales that lose least.

    w = (code - zero) * scale of its group,  code in [-2^(bits-1), 2^(bits-1) - 1]

A symmetric grid has no zero points. Its scale may be negative, which lays the one code that has no opposite (-8 of 4
bits) on the side of the group's largest entry: llama.cpp's Q4_0 does the same. Shapes: weight (out, in), scales and
zeros (out, groups), where group g holds the inputs [g * size, (g + 1) * size).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16
"""What scales are stored in."""
CLIPS = tuple(1 - 0.04 * step for step in range(13))
"""Shares of the largest entry that the range search tries, 1 to 0.52."""
_ROWS = 1 << 21
"""How many weights are searched at once: the candidates of more would leave the caches."""


class GridWeight(NamedTuple):
    """A weight on its grid: codes int8 (out, in), scales (out, groups), zero points int8 (out, groups) or None."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None


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


def nearest_codes(weight_OI: Tensor, scales_OG: Tensor, bits: int, zeros_OG: Tensor | None = None) -> Tensor:
    """The nearest code of each entry, int8 (out, in), clipped to the range; scales as they are stored."""
    groups_OGS = _grouped(weight_OI, weight_OI.shape[1] // scales_OG.shape[1])
    codes = groups_OGS / _divisors(scales_OG)
    codes = codes if zeros_OG is None else codes.add_(zeros_OG.unsqueeze(-1))
    return codes.round_().clamp_(*code_range(bits)).to(torch.int8).view(weight_OI.shape)


def expand(codes_OI: Tensor, scales_OG: Tensor, dtype: torch.dtype, zeros_OG: Tensor | None = None) -> Tensor:
    """(code - zero) * scale, (out, in)."""
    groups_OGS = codes_OI.to(dtype).view(codes_OI.shape[0], scales_OG.shape[1], -1)
    groups_OGS = groups_OGS if zeros_OG is None else groups_OGS.sub_(zeros_OG.to(dtype).unsqueeze(-1))
    return groups_OGS.mul_(scales_OG.to(dtype).unsqueeze(-1)).view(codes_OI.shape)


def beyond(weight_OI: Tensor, scales_OG: Tensor, bits: int, zeros_OG: Tensor | None = None) -> int:
    """How many entries the codes can't reach."""
    scales = torch.where(scales_OG == 0, torch.inf, scales_OG.float()).unsqueeze(-1)
    codes = _grouped(weight_OI, weight_OI.shape[1] // scales_OG.shape[1]) / scales
    codes = codes if zeros_OG is None else codes + zeros_OG.unsqueeze(-1)
    lowest, highest = code_range(bits)
    return int(((codes < lowest - 0.5) | (codes > highest + 0.5)).sum())


@torch.no_grad()
def rounded(
    weight_OI: Tensor, group_size: int, bits: int, importance_I: Tensor | None = None, symmetric: bool = True
) -> GridWeight:
    """The weight on the grid whose range loses least, each entry on its nearest code."""
    if symmetric:
        scales_OG, zeros_OG = searched_scales(weight_OI, group_size, bits, importance_I), None
    else:
        scales_OG, zeros_OG = searched_ranges(weight_OI, group_size, bits, importance_I)
    return GridWeight(nearest_codes(weight_OI, scales_OG, bits, zeros_OG), scales_OG, zeros_OG)


@torch.no_grad()
def searched_scales(weight_OI: Tensor, group_size: int, bits: int, importance_I: Tensor | None = None) -> Tensor:
    """Scales (out, groups), as stored, with the least error that clipping and then least squares reach.

    The error of a group is sum_i h_i (w_i - code_i scale)^2 with h the importance of its inputs, E[x_i^2] where
    activations are known and 1 otherwise. Clipping gives up the largest entries for a finer grid of the others; for the
    codes of the best range the best scale then has a closed form, <w h code> / <code h code>.
    """
    rows = max(1, _ROWS // weight_OI.shape[1])
    return torch.cat([_searched(piece, group_size, bits, importance_I) for piece in weight_OI.split(rows)])


@torch.no_grad()
def searched_ranges(
    weight_OI: Tensor, group_size: int, bits: int, importance_I: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `searched_scales` of an asymmetric grid: scales, and zero points as codes, int8 (out, groups).

    A range [clip * min, clip * max], widened to hold zero, is divided into all codes.
    """
    rows = max(1, _ROWS // weight_OI.shape[1])
    pieces = [_searched_range(piece, group_size, bits, importance_I) for piece in weight_OI.split(rows)]
    return torch.cat([scales for scales, _ in pieces]), torch.cat([zeros for _, zeros in pieces])


def _searched_range(
    weight_OI: Tensor, group_size: int, bits: int, importance_I: Tensor | None
) -> tuple[Tensor, Tensor]:
    groups_OGS, h_GS = _grouped(weight_OI, group_size), _importances(weight_OI, group_size, importance_I)
    low, high = groups_OGS.amin(-1).clamp(max=0), groups_OGS.amax(-1).clamp(min=0)
    lowest, highest = code_range(bits)
    best_scales, best_zeros = torch.zeros_like(low, dtype=SCALE_DTYPE), torch.zeros_like(low)
    least = torch.full_like(low, torch.inf)
    for clip in CLIPS if bits < 8 else CLIPS[:1]:
        scales = ((high - low) * clip / (highest - lowest)).to(SCALE_DTYPE)
        zeros = (lowest - low * clip / _divisors(scales).squeeze(-1)).round_().clamp_(lowest, highest)
        for _ in range(2):
            codes = (groups_OGS / _divisors(scales)).add_(zeros.unsqueeze(-1)).round_().clamp_(lowest, highest)
            codes -= zeros.unsqueeze(-1)
            error = (codes * scales.float().unsqueeze(-1) - groups_OGS).square_().mul_(h_GS).sum(-1)
            better = error < least
            best_scales, best_zeros = torch.where(better, scales, best_scales), torch.where(better, zeros, best_zeros)
            least = torch.where(better, error, least)
            scales = _fitted(codes, groups_OGS, h_GS, scales)
    return best_scales, best_zeros.to(torch.int8)


def _importances(weight_OI: Tensor, group_size: int, importance_I: Tensor | None) -> Tensor:
    """h (groups, size)."""
    shape = (weight_OI.shape[1] // group_size, group_size)
    if importance_I is None:
        return torch.ones(shape, device=weight_OI.device)
    return importance_I.to(weight_OI.device, torch.float32).view(shape)


def _fitted(codes_OGS: Tensor, groups_OGS: Tensor, h_GS: Tensor, scales_OG: Tensor) -> Tensor:
    """The best scales for these codes by least squares; a group of zeros keeps its own."""
    weighted = codes_OGS * h_GS
    fitted = (weighted * groups_OGS).sum(-1) / (weighted * codes_OGS).sum(-1)
    return torch.where(fitted.isfinite() & (fitted != 0), fitted, scales_OG.float()).to(SCALE_DTYPE)


def _searched(weight_OI: Tensor, group_size: int, bits: int, importance_I: Tensor | None) -> Tensor:
    groups_OGS, h_GS = _grouped(weight_OI, group_size), _importances(weight_OI, group_size, importance_I)
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
            scales = _fitted(codes, groups_OGS, h_GS, scales)
    return best


def _grouped(weight_OI: Tensor, group_size: int) -> Tensor:
    return weight_OI.float().reshape(weight_OI.shape[0], -1, group_size)


def _divisors(scales_OG: Tensor) -> Tensor:
    """The scales in float32, (out, groups, 1), with 1 for those of groups of zeros, whose codes are zeros anyway."""
    scales = scales_OG.float()
    return torch.where(scales == 0, 1.0, scales).unsqueeze(-1)


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes (out, in) in 4 or 8 bits as int32 (out, ceil(in * bits / 32)), the first lowest, each plus 2^(bits-1).

    That is how compressed-tensors stores them. Inputs beyond the last stand as zero bits.
    """
    padded = torch.nn.functional.pad(codes_OI.to(torch.int8), (0, -codes_OI.shape[1] % (32 // bits)))
    if bits == 8:
        octets = padded.view(torch.uint8) ^ 0x80
    else:
        nibbles = (padded + 8).to(torch.uint8)
        octets = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    # Flat, because a single row counts as contiguous with any stride, and a view takes whole words alone.
    return octets.reshape(-1).view(torch.int32).view(codes_OI.shape[0], -1)


def unpack(packed: Tensor, inputs: int, bits: int) -> Tensor:
    """The inverse of `pack`: int8 codes (out, in)."""
    octets = packed.contiguous().view(torch.uint8)
    if bits == 8:
        return (octets[:, :inputs] ^ 0x80).contiguous().view(torch.int8)
    codes = torch.stack([octets & 0xF, octets >> 4], dim=-1).view(packed.shape[0], -1)
    return codes[:, :inputs].to(torch.int8).sub_(8)
