"""A dense update of a dense linear layer in one product: y = x (W + s dW)^T + b.

Saved are the input and the factors of the update, which is made again in the backward pass: no second matrix of the
weight's size is kept for each layer. In 16 bits W + s dW would be rounded to W, so that there the products stay two.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtune.bases import base_of
from slimtune.bases.dense import PLAIN_TENSORS, DenseLinear
from slimtune.delta import Frozen
from slimtune.methods.loha import LohaLinear
from slimtune.ops import fuses


@fuses(LohaLinear, DenseLinear)
def dense_update(delta: LohaLinear, module: Any, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`base(x) + s dW x`, fused where the base is a plain frozen product in the adapter's precision."""
    weight_OI = base.weight
    drops = delta.training and (delta.rank_dropout or delta.module_dropout)
    if args or kwargs or drops or not _is_plain(module, weight_OI, x, delta.factors[0].dtype):
        return delta.forward(base, x, *args, **kwargs)
    x_TI = x.reshape(-1, x.shape[-1])
    y_TO: Any = _DenseUpdate.apply(delta.update, x_TI, weight_OI, module.bias, *delta.factors)
    # Not inside: what a custom function returns as a view can't be changed in place.
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


def _is_plain(module: Any, weight: Tensor, x: Any, dtype: torch.dtype) -> bool:
    return (
        type(x) in PLAIN_TENSORS
        and x.dtype == weight.dtype == dtype
        and dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(x.device.type)
        and base_of(module).may_fuse(module)
    )


class _DenseUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, update: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI, *factors)
        ctx.update = update
        return F.linear(x, update(*factors).add_(weight_OI), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_OI, *factors = ctx.saved_tensors
        g_TO, x_TI = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (gradients[0], x))
        leaves = [factor.detach().requires_grad_() for factor in factors]
        with torch.enable_grad():
            update_OI = ctx.update(*leaves)
        of_factors = torch.autograd.grad(update_OI, leaves, g_TO.t() @ x_TI) if any(ctx.needs_input_grad[4:]) else []
        _, needs_x, _, needs_bias, *_ = ctx.needs_input_grad
        gx = (g_TO @ update_OI.detach().add_(weight_OI)).view(x.shape) if needs_x else None
        return None, gx, None, g_TO.sum(0) if needs_bias else None, *(of_factors or [None] * len(factors))
