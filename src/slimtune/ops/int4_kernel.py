"""4-bit codes in the order of torch's kernel for the CPU, and back; and the product with few tokens that reads them.

The kernel wants blocks of 64 or 32 rows, by what the processor can, with the rows of a block interleaved for each
input. That order belongs to the machine and to the version of torch, so that it is found out by packing numbered codes
rather than assumed, and never written to a file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

MOST_TOKENS = 8
"""From here on expanding and multiplying is quicker, by `python -m benchmarks.slim`."""
_GROUPS = (32, 64, 128, 256)
"""The sizes of groups that the kernel takes."""
_ROWS = 16
"""Outputs come in multiples of this many."""
_PROBE = 32
"""Inputs of the codes by which the order is found out."""


def takes(outputs: int, inputs: int, group_size: int) -> bool:
    """Whether the kernel multiplies by a weight of this shape, and its order is one that can be undone."""
    return outputs % _ROWS == 0 and group_size in _GROUPS and inputs % group_size == 0 and _is_known(outputs)


@cache
def _is_known(outputs: int) -> bool:
    return all(_row_order(rows) is not None for _, rows in _blocks(outputs))


def to_kernel(codes_OI: Tensor) -> Tensor:
    """Codes in -8 to 7 as the kernel reads them, uint8 (out, in / 2)."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI.int() + 8, 1)


def from_kernel(packed: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """The inverse of `to_kernel`: codes transposed, (in, out), as numbers of any type."""
    outputs, inputs = packed.shape[0], packed.shape[1] * 2
    whole = outputs - outputs % _block_size()
    codes_IO = packed.new_empty(inputs, outputs, dtype=dtype)
    # All whole blocks at once, and what is left as one smaller block.
    for first, end, rows in ((0, whole, _block_size()), (whole, outputs, outputs - whole)):
        if end > first:
            _unpack(packed[first:end], codes_IO[:, first:end].unflatten(1, (-1, rows)))
    return codes_IO


def _unpack(packed: Tensor, codes_IBR: Tensor) -> None:
    """Write the codes of blocks of rows, (in, blocks, rows), of which a byte holds two."""
    inputs, blocks, rows = codes_IBR.shape
    # 8 more than a code with its highest bit flipped is the code in two's complement, whose sign a shift spreads.
    octets = (packed.reshape(blocks, inputs, rows // 2) ^ 0x88).view(torch.int8)
    halves = (octets << 4).bitwise_right_shift_(4), octets.bitwise_right_shift_(4)
    codes_BIR = codes_IBR.transpose(0, 1)
    for run in _runs(rows):
        # The copy changes the type: a weight that is expanded is written once.
        codes_BIR[..., run.row : run.row + run.length] = halves[run.half][..., run.place : run.place + run.length]


def kernel_scales(scales_OG: Tensor, zeros_OG: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Scales as the kernel reads them, (groups, out, 2), with what it adds to code * scale: -zero * scale."""
    scales_GO = scales_OG.t().float()
    offsets_GO = torch.zeros_like(scales_GO) if zeros_OG is None else -zeros_OG.t() * scales_GO
    return torch.stack([scales_GO, offsets_GO], dim=-1).to(dtype).contiguous()


def product(x: Tensor, packed: Tensor, group_size: int, scales_GO2: Tensor) -> Tensor:
    """x W^T with x (..., in) in the dtype of the scales."""
    x_TI = x.reshape(-1, x.shape[-1]).to(scales_GO2.dtype).contiguous()
    # By its name in torch: `torch.ops` would take some microseconds more to find it, at each layer of each token.
    y_TO = torch._weight_int4pack_mm_for_cpu(x_TI, packed, group_size, scales_GO2)  # pyright: ignore[reportPrivateImportUsage]
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


def _blocks(outputs: int) -> Iterator[tuple[int, int]]:
    """The first row of each block and how many it has; the last may be smaller."""
    size = _block_size()
    for first in range(0, outputs, size):
        yield first, min(size, outputs - first)


@cache
def _block_size() -> int:
    """The rows of a whole block: two for each of the bytes that hold the first input."""
    low, _ = _numbered(64)
    return 2 * int((low % _PROBE == 0).int().argmin())


@cache
def _row_order(rows: int) -> Tensor | None:
    """Where each row of a block stands among the low halves of an input's bytes and then the high ones.

    None where inputs aren't laid out one after the other, in an order that no version of torch has had so far.
    """
    low, high = (half.view(-1, rows // 2) for half in _numbered(rows))
    numbers = torch.cat([low, high], dim=1)  # (inputs, rows): row * _PROBE + input
    rows_of, inputs_of = numbers // _PROBE, numbers % _PROBE
    is_known = (rows_of == rows_of[:1]).all() and (inputs_of == torch.arange(_PROBE)[:, None]).all()
    return rows_of[0].argsort() if is_known else None


class _Run(NamedTuple):
    """Rows of a block that follow each other in one half of an input's bytes: copied much faster than single ones."""

    half: int
    place: int
    row: int
    length: int


@cache
def _runs(rows: int) -> tuple[_Run, ...]:
    """`_row_order` as runs."""
    order: list[int] = _row_order(rows).tolist()  # type: ignore[union-attr]
    size = rows // 2
    starts = [i for i in range(rows) if i == 0 or order[i] != order[i - 1] + 1 or order[i] == size]
    return tuple(
        _Run(order[start] // size, order[start] % size, start, end - start)
        for start, end in itertools.pairwise([*starts, rows])
    )


def _numbered(rows: int) -> tuple[Tensor, Tensor]:
    """Which code, by row * _PROBE + input, each byte of a packed block holds in its low and in its high half."""
    numbers = torch.arange(rows * _PROBE).view(rows, _PROBE)
    low = high = torch.zeros(rows * _PROBE // 2, dtype=torch.int64)
    # A number has more than 4 bits: packed 4 bits at a time.
    for shift in range(0, 12, 4):
        octets = to_kernel((numbers >> shift & 0xF) - 8).reshape(-1).long()
        low, high = low | (octets & 0xF) << shift, high | (octets >> 4) << shift
    return low, high
