"""A product with a weight that is computed from trained parameters, and computed again in the backward pass.

    y = x W(p)^T + b(p)

Kept are x and p. A weight that autograd kept for each layer would be the whole model a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtune.ops.autograd import is_traced, no_autocast

Build = Callable[[], tuple[Tensor, Tensor | None]]
"""Computes W (out, in) and b (out,) from the parameters."""


def rebuilt_linear(x: Tensor, build: Build, parameters: Sequence[Tensor]) -> Tensor:
    """x W^T + b in the dtype of W, or of autocast.

    Args:
        parameters: all that W and b are computed from and that needs a gradient.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if is_traced() or not torch.is_grad_enabled():
        weight_OI, bias_O = _built(build, dtype, device)
        with no_autocast(device):
            return F.linear(x.to(weight_OI.dtype), weight_OI, bias_O)
    y_TO: Any = _RebuiltLinear.apply(x.reshape(-1, x.shape[-1]), build, dtype, *parameters)
    # Not inside: what a custom function returns as a view can't be changed in place.
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


def straight_linear(x: Tensor, build: Build, bias_O: Tensor | None, a_RI: Tensor | None, b_OR: Tensor | None) -> Tensor:
    """x W^T + b with a W that is B A added and then rounded, whose gradient goes straight through the rounding.

    It is LoRA's own then, without one of (out, in):  dB = g^T (x A^T),  dA = (g B)^T x.

    Args:
        build: computes W; what it gives as a bias is left.
        bias_O: b, with its own gradient.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    with no_autocast(device):
        y_TO: Any = _StraightLinear.apply(x.reshape(-1, x.shape[-1]), build, dtype, bias_O, a_RI, b_OR)
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


def _built(build: Build, dtype: torch.dtype | None, device: str) -> tuple[Tensor, Tensor | None]:
    """W and b in what the product is computed in; they are computed in their own dtypes, also under autocast."""
    with no_autocast(device):
        weight_OI, bias_O = build()
    dtype = weight_OI.dtype if dtype is None else dtype
    return weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype)


class _RebuiltLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, build: Build, dtype: torch.dtype | None, *parameters: Tensor) -> Tensor:
        weight_OI, bias_O = _built(build, dtype, x_TI.device.type)
        ctx.save_for_backward(x_TI)
        ctx.build, ctx.dtype, ctx.parameters = build, dtype, parameters
        with no_autocast(x_TI.device.type):
            return F.linear(x_TI.to(weight_OI.dtype), weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *received: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g_TO,) = received
        (x_TI,) = ctx.saved_tensors
        with torch.enable_grad():
            weight_OI, bias_O = _built(ctx.build, ctx.dtype, x_TI.device.type)
        wanted = [p for p, needed in zip(ctx.parameters, ctx.needs_input_grad[3:], strict=True) if needed]
        with no_autocast(x_TI.device.type):
            g_TO = g_TO.to(weight_OI.dtype)
            gx_TI = (g_TO @ weight_OI.detach()).to(x_TI.dtype) if ctx.needs_input_grad[0] else None
            if not wanted:
                return gx_TI, None, None, *(None for _ in ctx.parameters)
            built = [(t, g) for t, g in _gradients(g_TO, x_TI, weight_OI, bias_O) if t.requires_grad]
            tensors, gradients = zip(*built, strict=True) if built else ((), ())
            grads = torch.autograd.grad(tensors, wanted, gradients, allow_unused=True) if built else ()
        by_id = {id(p): g for p, g in zip(wanted, grads, strict=False)}
        return gx_TI, None, None, *(by_id.get(id(p)) for p in ctx.parameters)


def _gradients(g_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """W and b with their gradients, of those that need one."""
    pairs = []
    if weight_OI.requires_grad:
        # (out, in), the size of W for one layer at a time.
        pairs.append((weight_OI, g_TO.t() @ x_TI.to(g_TO.dtype)))
    if bias_O is not None and bias_O.requires_grad:
        pairs.append((bias_O, g_TO.sum(0)))
    return pairs


class _StraightLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, build: Build, dtype: torch.dtype | None, bias_O: Tensor | None, a_RI: Tensor | None,
        b_OR: Tensor | None,
    ) -> Tensor:  # fmt: skip
        weight_OI, _ = _built(build, dtype, x_TI.device.type)
        ctx.build, ctx.dtype = build, dtype
        ctx.save_for_backward(x_TI, a_RI, b_OR)
        return F.linear(x_TI.to(weight_OI.dtype), weight_OI, None if bias_O is None else bias_O.to(weight_OI.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *received: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g_TO,) = received
        x_TI, a_RI, b_OR = ctx.saved_tensors
        needs_x, _, _, needs_bias, needs_a, needs_b = ctx.needs_input_grad
        weight_OI, _ = _built(ctx.build, ctx.dtype, x_TI.device.type)
        g_TO, x = g_TO.to(weight_OI.dtype), x_TI.to(weight_OI.dtype)
        gx_TI = (g_TO @ weight_OI).to(x_TI.dtype) if needs_x else None
        ga_RI = ((g_TO @ b_OR.to(x.dtype)).t() @ x).to(a_RI.dtype) if needs_a else None
        gb_OR = (g_TO.t() @ (x @ a_RI.to(x.dtype).t())).to(b_OR.dtype) if needs_b else None
        return gx_TI, None, None, g_TO.sum(0) if needs_bias else None, ga_RI, gb_OR
