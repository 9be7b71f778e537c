"""Weights in 4 bits: codes from -8 to 7 with a signed scale for each group of inputs, w = code * scale.

4.25 bits a weight in groups of 64 with scales in bfloat16. One copy of the codes is held: int32, eight codes each, as
they stand in a file; or, from the first answer on a CPU, uint8 in the order of torch's kernel, which the module then
learns from as well. Which one it is shows in the dtype.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.bases.integer import HoldsCodes, IntegerLinear
from slimtune.core.frozen import Base
from slimtune.ops import grid, int4_kernel
from slimtune.ops.autograd import Product
from slimtune.ops.freed_memory import return_freed_memory
from slimtune.storage.compressed import ZERO


class Int4Linear(IntegerLinear):
    """4-bit codes in groups of inputs."""

    bits = 4
    most_tokens = int4_kernel.MOST_TOKENS
    module_types = ("slimtune.bases.int4.LinearInt4",)

    def hold_codes(self, codes_OI: Tensor) -> Tensor:
        return grid.pack(codes_OI, 4)

    def codes(self, module: Any) -> Tensor:
        return _codes(module.weight.data, module.in_features).contiguous()

    @torch.no_grad()
    def expand(
        self, module: Any, codes: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if codes.dtype == torch.uint8:
            # (in, out), as the kernel's order unpacks without a transpose; the product takes either. Scales and zeros
            # are laid out so too: read in steps of a row they take longer than all the rest.
            outputs, groups = scales_OG.shape
            groups_GSO = int4_kernel.from_kernel(codes, dtype).view(groups, -1, outputs)
            if zeros_OG is not None:
                groups_GSO.sub_(zeros_OG.t().to(dtype).contiguous().unsqueeze(1))
            return groups_GSO.mul_(scales_OG.t().to(dtype).contiguous().unsqueeze(1)).view(-1, outputs).t()
        return grid.expand(_codes(codes, module.in_features), scales_OG, dtype, zeros_OG)

    def kernel(self, module: Any, dtype: torch.dtype) -> Product | None:
        group_size = self.group_size(module)
        takes = int4_kernel.takes(module.out_features, module.in_features, group_size)
        if not takes or module.weight.device.type != "cpu":
            return None
        if module.weight.dtype != torch.uint8:
            packed = int4_kernel.to_kernel(_codes(module.weight.data, module.in_features))
            # In one step: another thread that reads the weight sees the codes in the one order or in the other.
            module._parameters["weight"] = nn.Parameter(packed, requires_grad=False)
            return_freed_memory()
        scales = int4_kernel.kernel_scales(module.weight_scale, module._buffers.get(ZERO), dtype)
        return functools.partial(int4_kernel.product, packed=module.weight, group_size=group_size, scales_GO2=scales)


def _codes(held: Tensor, inputs: int) -> Tensor:
    """Codes in either order as int8 (out, in)."""
    return int4_kernel.from_kernel(held).t() if held.dtype == torch.uint8 else grid.unpack(held, inputs, 4)


class LinearInt4(HoldsCodes, nn.Linear):  # pyright: ignore[reportIncompatibleMethodOverride]
    """An `nn.Linear` in 4 bits."""

    packed_base = Int4Linear()


BASES: tuple[Base, ...] = (Int4Linear(),)
