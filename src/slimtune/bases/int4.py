"""Weights in 4 bits: codes from -8 to 7 with a signed scale for each group of inputs, w = code * scale.

4.25 bits a weight in groups of 64 with scales in bfloat16. One copy of the codes is held: int32, eight codes each, as
they stand in a file; or, from the first answer on a CPU, uint8 in the order of torch's kernel, which the module then
learns from as well. Which one it is shows in the dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.bases.integer import HoldsCodes, IntegerLinear
from slimtune.core.delta import Base
from slimtune.ops import grid, int4_kernel
from slimtune.ops.autograd import reads_codes
from slimtune.ops.freed_memory import return_freed_memory
from slimtune.storage.compressed import ZERO


class Int4Linear(IntegerLinear):
    """4-bit codes in groups of inputs."""

    bits = 4
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
            # (in, out), as the kernel's order unpacks without a transpose; the product takes either.
            groups_GSO = int4_kernel.from_kernel(codes).to(dtype).view(scales_OG.shape[1], -1, scales_OG.shape[0])
            if zeros_OG is not None:
                groups_GSO.sub_(zeros_OG.t().to(dtype).unsqueeze(1))
            return groups_GSO.mul_(scales_OG.t().to(dtype).unsqueeze(1)).view(-1, scales_OG.shape[0]).t()
        return grid.expand(_codes(codes, module.in_features), scales_OG, dtype, zeros_OG)

    def for_few_tokens(self, module: Any, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        dtype = self.product_dtype(module, x) if self.is_packed(module) else torch.float32
        if not reads_codes(x, dtype, int4_kernel.MOST_TOKENS) or module.weight.device.type != "cpu":
            return None
        group_size = self.group_size(module)
        if not int4_kernel.takes(module.out_features, module.in_features, group_size):
            return None
        codes, scales = _for_kernel(module, dtype)
        return lambda x: int4_kernel.product(x, codes, group_size, scales)


def _codes(held: Tensor, inputs: int) -> Tensor:
    """Codes in either order as int8 (out, in)."""
    return int4_kernel.from_kernel(held).t() if held.dtype == torch.uint8 else grid.unpack(held, inputs, 4)


def _for_kernel(module: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The module's codes and scales as the kernel reads them, from now on the ones that it holds."""
    codes, scales = module.weight, module._buffers.get("kernel_scale")
    if codes.dtype != torch.uint8:
        packed = int4_kernel.to_kernel(_codes(codes.data, module.in_features))
        # In one step: another thread that reads the weight sees the codes in the one order or in the other.
        codes = module._parameters["weight"] = nn.Parameter(packed, requires_grad=False)
        return_freed_memory()
    # A merge, and what undoes it, exchange the scales: those for the kernel remember which they were made from.
    if scales is None or scales.dtype != dtype or scales.__dict__.get("made_from") is not module.weight_scale:
        scales = int4_kernel.kernel_scales(module.weight_scale, module._buffers.get(ZERO), dtype)
        scales.made_from = module.weight_scale  # type: ignore[attr-defined]
        module.register_buffer("kernel_scale", scales, persistent=False)
    return codes.data, scales


class LinearInt4(HoldsCodes, nn.Linear):  # pyright: ignore[reportIncompatibleMethodOverride]
    """An `nn.Linear` in 4 bits."""

    packed_base = Int4Linear()


BASES: tuple[Base, ...] = (Int4Linear(),)
