"""VeRA on a frozen linear layer in one autograd node, computed in the base's precision as LoRA is.

Saved is the (tokens, r) product with A, and not the input, whose products nothing learns from. The gradient of b needs
B z of each token, or the gradient of B as a matrix, which takes as many multiplications and no memory of the output's
size: the latter is summed by rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtune.bases.dense import DenseLinear
from slimtune.bases.packed import PackedLinear
from slimtune.delta import Frozen
from slimtune.methods.vera import VeraLinear
from slimtune.ops import fuses
from slimtune.ops.frozen_linear import no_autocast
from slimtune.ops.lora_linear import Pass, apply_mask, stays_plain, this_pass


@fuses(VeraLinear, PackedLinear)
@fuses(VeraLinear, DenseLinear)
def vera_linear(delta: VeraLinear, module: Any, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`base(x) + b * (B(d * A(dropout(x))))`, fused where the base is a plain frozen product."""
    if args or kwargs or stays_plain(delta, module, base, x):
        return delta.forward(base, x, *args, **kwargs)
    settings = this_pass(base, x, 1.0, delta.vera_dropout if delta.training else 0.0)
    vectors = delta.vera_lambda_d, delta.vera_lambda_b
    y_TO: Any = _VeraLinear.apply(x, base.weight, base.bias, *delta.corners, *vectors, settings)
    return settings.output(y_TO)


class _VeraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, d_R: Tensor,
        b_O: Tensor, settings: Pass,
    ) -> Tensor:  # fmt: skip
        dtype = settings.dtype
        with no_autocast(x.device.type):
            x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
            y_TO = F.linear(x_TI, weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))
            keep, probability = settings.mask(x_TI)
            u_TR = (x_TI if keep is None else apply_mask(x_TI, keep)) @ a_RI.to(dtype).t()
            if keep is not None:
                u_TR.div_(probability)
            y_TO.addmm_(u_TR * d_R.to(dtype), _by_rows(b_OR, b_O, dtype).t())
        ctx.save_for_backward(settings.kept(weight_OI), a_RI, b_OR, d_R, b_O, u_TR)
        ctx.settings = settings
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *received: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = received
        weight_OI, a_RI, b_OR, d_R, b_O, u_TR = ctx.saved_tensors
        settings: Pass = ctx.settings
        dtype = settings.dtype
        needs_x, _, needs_bias, _, _, needs_d, needs_b = ctx.needs_input_grad[:7]
        gx = gd_R = gb_O = None
        with no_autocast(gradient.device.type):
            g_TO = gradient.reshape(-1, gradient.shape[-1]).to(dtype)
            scaled_R = d_R.to(dtype)
            gz_TR = g_TO @ _by_rows(b_OR, b_O, dtype)
            if needs_d:
                gd_R = (gz_TR * u_TR).sum(0, dtype=d_R.dtype)
            if needs_b:
                gb_O = torch.linalg.vecdot((g_TO.t() @ (u_TR * scaled_R)).to(b_O.dtype), b_OR)
            if needs_x:
                gx_TI = g_TO @ settings.weight(weight_OI)
                gu_TR = gz_TR.mul_(scaled_R)
                keep, probability = settings.mask(gx_TI)
                if keep is None:
                    gx_TI.addmm_(gu_TR, a_RI.to(dtype))
                else:
                    gx_TI.add_(apply_mask(gu_TR.div_(probability) @ a_RI.to(dtype), keep))
                gx = gx_TI.view(settings.shape).to(settings.x_dtype)
            gbias_O = g_TO.sum(0) if needs_bias else None
        return gx, None, gbias_O, None, None, gd_R, gb_O, None


def _by_rows(b_OR: Tensor, b_O: Tensor, dtype: torch.dtype) -> Tensor:
    """b * B, each row of B by its number."""
    return (b_OR * b_O[:, None]).to(dtype)
