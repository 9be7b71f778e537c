"""A product with a frozen weight that is expanded again for the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtune.ops.autograd import is_traced, no_autocast

_EMULATED_FROM = 4
"""Tokens from which casting to float32 and back is quicker than a product in an emulated bfloat16."""


def frozen_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dequantizer: Callable[[], Tensor] | None, dtype: torch.dtype
) -> Tensor:
    """y = x W^T + b, computed in `dtype` or in that of autocast, given back in the dtype of x.

    Args:
        dequantizer: expands the weight once more for the backward pass; None where the weight is kept.
    """
    is_cast = torch.is_autocast_enabled(x.device.type)
    # Under autocast the output stays in its dtype, as that of a plain `nn.Linear` does there.
    dtype = torch.get_autocast_dtype(x.device.type) if is_cast else dtype
    with no_autocast(x.device.type):
        x_TI, weight_OI = x.to(dtype), weight_OI.to(dtype)
        bias_O = None if bias_O is None else bias_O.to(dtype)
        if dequantizer is None or is_traced():
            y: Any = F.linear(x_TI, weight_OI, bias_O)
        else:
            y_TO: Any = _FrozenLinear.apply(x_TI.reshape(-1, x.shape[-1]), weight_OI, bias_O, dequantizer)
            # Not inside: what a custom function returns as a view can't be changed in place.
            y = y_TO.view(*x.shape[:-1], y_TO.shape[-1])
    return y if is_cast else y.to(x.dtype)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dequantizer: Callable[[], Tensor]
    ) -> Tensor:
        # Neither x nor W is saved: W learns nothing, so that its gradient, which reads x, is never formed.
        ctx.dequantizer = dequantizer
        dtype = multiplied_in(x_TI)
        bias_O = None if bias_O is None else bias_O.to(dtype)
        return F.linear(x_TI.to(dtype), weight_OI.to(dtype), bias_O).to(x_TI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *received: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g_TO,) = received
        needs_x, _, needs_bias, _ = ctx.needs_input_grad
        with no_autocast(g_TO.device.type):
            # (tokens, out) by (out, in): W as it is stored, no transpose is made.
            dtype = multiplied_in(g_TO)
            gx_TI = (g_TO.to(dtype) @ ctx.dequantizer().to(dtype)).to(g_TO.dtype) if needs_x else None
            gbias_O = g_TO.sum(0) if needs_bias else None
        return gx_TI, None, gbias_O, None


def multiplied_in(x_TI: Tensor) -> torch.dtype:
    """The dtype in which a product with x is computed, float32 in place of a bfloat16 that the processor emulates.

    256 tokens take a seventh of the time forward and a thirtieth backward (AMD EPYC, AVX2), and are rounded once.
    """
    is_emulated = x_TI.dtype == torch.bfloat16 and x_TI.device.type == "cpu" and _emulates_bfloat16()
    return torch.float32 if is_emulated and x_TI.shape[0] >= _EMULATED_FROM else x_TI.dtype


@cache
def _emulates_bfloat16() -> bool:
    # What torch asks before it hands a product to oneDNN; its own one takes one number after the other.
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
