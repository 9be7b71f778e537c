"""VeRA on a frozen linear layer in one autograd node: LoRA's products, with A and M = diag(b) B diag(d).

Saved is the (tokens, r) product with A, and not the input, whose products nothing learns from; M is made again. The
gradients of both vectors are sums of M's. In 32 bits one product with W + M A takes less work where r is large beside
the layer and tokens are many; saved is the input then.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtune.bases.dense import DenseLinear
from slimtune.bases.packed import PackedLinear
from slimtune.core.frozen import Frozen
from slimtune.fused import fuses
from slimtune.fused.lora import Pass, gradients, products, stays_plain, this_pass
from slimtune.fused.lycoris import is_of_one_dtype
from slimtune.methods.lycoris.base import would_swallow
from slimtune.methods.vera import VeraLinear
from slimtune.ops.autograd import no_autocast


@fuses(VeraLinear, PackedLinear)
@fuses(VeraLinear, DenseLinear)
def vera_linear(delta: VeraLinear, module: Any, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`base(x) + b * (B(d * A(dropout(x))))`, fused where the base is a plain frozen product."""
    if args or kwargs or stays_plain(delta, module, base, x):
        return delta.forward(base, x, *args, **kwargs)
    vectors, dropout = (delta.vera_lambda_d, delta.vera_lambda_b), delta.vera_dropout if delta.training else 0.0
    is_alike = x.dtype == vectors[0].dtype and is_of_one_dtype(module, base, x)
    # In 16 bits W + M A is rounded to W's digits and loses most of M A; and dropout is for A's input alone.
    may_sum = is_alike and not dropout and not would_swallow(base.weight)
    settings, sums = this_pass(base, x, 1.0, dropout), may_sum and _sum_is_cheaper(delta, x)
    y_TO: Any = _VeraLinear.apply(x, base.weight, base.bias, *delta.corners, *vectors, settings, sums)
    return settings.output(y_TO)


def _sum_is_cheaper(delta: VeraLinear, x: Tensor) -> bool:
    """Whether products with W + M A multiply less often than those with A and M do beside W's."""
    (r, features_in), (features_out, _) = (corner.shape for corner in delta.corners)
    tokens, weights = x.numel() // features_in, features_in * features_out
    return tokens * weights + 3 * r * weights < tokens * r * (2 * features_in + 3 * features_out)


class _VeraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, d_R: Tensor,
        b_O: Tensor, settings: Pass, sums: bool,
    ) -> Tensor:  # fmt: skip
        # (out, r), as large as B, which all layers share: kept, each layer would have one of its own.
        m_OR = b_OR * d_R * b_O[:, None]
        with no_autocast(x.device.type):
            x_TI = x.reshape(-1, x.shape[-1]).to(settings.dtype)
            if sums:
                # W + M A is another weight of (out, in) that lives for this line.
                y_TO = F.linear(x_TI, torch.addmm(weight_OI, m_OR, a_RI), bias_O)
                kept = None if settings.maker else x_TI
            else:
                y_TO, kept = products(x_TI, weight_OI, bias_O, a_RI, m_OR, settings)
        ctx.save_for_backward(settings.kept(weight_OI), a_RI, b_OR, d_R, b_O, kept)
        ctx.settings, ctx.sums = settings, sums
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *received: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = received
        weight_OI, a_RI, b_OR, d_R, b_O, kept = ctx.saved_tensors
        settings: Pass = ctx.settings
        needs_x, _, needs_bias, _, _, needs_d, needs_b = ctx.needs_input_grad[:7]
        gd_R = gb_O = None
        with no_autocast(gradient.device.type):
            g_TO = gradient.reshape(-1, gradient.shape[-1]).to(settings.dtype)
            m_OR, needs_m = b_OR * d_R * b_O[:, None], needs_d or needs_b
            if ctx.sums:
                gm_OR = (g_TO.t() @ settings.input(kept)) @ a_RI.t() if needs_m else None
                gx = (g_TO @ torch.addmm(weight_OI, m_OR, a_RI)).view(settings.shape) if needs_x else None
            else:
                # Of the input, a dropout mask needs the shape alone.
                x_TI = g_TO.new_empty(()).expand(len(g_TO), a_RI.shape[1])
                needed = needs_x, False, needs_m
                gx, _, gm_OR = gradients(g_TO, x_TI, kept, weight_OI, a_RI, m_OR, settings, needed)
            if gm_OR is not None:
                # M_or = b_o B_or d_r, hence dd_r = sum_o b_o B_or dM_or and db_o = sum_r B_or dM_or d_r: B joins once
                # for both.
                gm_OR.mul_(b_OR)
                gd_R, gb_O = b_O @ gm_OR, gm_OR @ d_R
            gbias_O = g_TO.sum(0) if needs_bias else None
        return gx, None, gbias_O, None, None, gd_R, gb_O, None, None
