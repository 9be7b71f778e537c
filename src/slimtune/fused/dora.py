"""DoRA on a frozen linear layer in one autograd node.

y = c * (x W^T + s B A x) + b: the product of LoRA, scaled by rows in place. Backward needs that product once more, for
the gradient of c; it is got back as y / c from the output, which whatever comes next keeps in most cases anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtune.bases.dense import DenseLinear
from slimtune.bases.packed import PackedLinear
from slimtune.core.frozen import Frozen
from slimtune.fused import fuses
from slimtune.fused.lora import Pass, gradients, products, stays_plain, this_pass
from slimtune.methods.lora.dora import DoraLinear, quotient
from slimtune.ops.autograd import no_autocast, saving_is_hooked
from slimtune.ops.scaling import column_dots, scale_columns, scale_rows

_LEAST_RATIO = 1e-12
"""A smaller |c| stands for zero: multiplied by it a product is nothing, and can still be got back."""


@fuses(DoraLinear, PackedLinear)
@fuses(DoraLinear, DenseLinear)
def dora_linear(delta: DoraLinear, module: Any, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """DoRA's equation, fused where the base is a plain frozen product and nothing is dropped."""
    # Dropout has the base run twice, over x and over dropout(x): no longer one product with a factor.
    dropping = delta.training and delta.lora_dropout
    if args or kwargs or dropping or stays_plain(delta, module, base, x):
        return delta.forward(base, x, *args, **kwargs)
    settings = this_pass(base, x, delta.scaling, 0.0)
    # Learning, c is formed from m and n inside of the node, which gives m its gradient. At rest c alone is needed.
    ratio_O, norms_O = (None, delta.norms_now(base)) if delta.learns else (delta.ratio_at_rest(base), None)
    scale = delta.lora_magnitude_vector, norms_O, ratio_O
    y_TO: Any = _DoraLinear.apply(x, base.weight, base.bias, *delta.pair, *scale, settings)
    return settings.output(y_TO)


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, magnitude_O: Tensor,
        norms_O: Tensor | None, ratio_O: Tensor | None, settings: Pass,
    ) -> Tensor:  # fmt: skip
        learns = norms_O is not None
        if norms_O is not None:
            ratio_O = quotient(magnitude_O, norms_O)
        assert ratio_O is not None
        with no_autocast(x.device.type):
            x_TI = x.reshape(-1, x.shape[-1]).to(settings.dtype)
            # P + b = x W^T + s z B^T + b, (tokens, out), which the ratio then scales in place.
            y_TO, z_TR = products(x_TI, weight_OI, bias_O, a_RI, b_OR, settings)
            straight_TO = shift_O = None
            if bias_O is not None:
                # c P + b is c (P + b) + (1 - c) b: at the start the output is the base's to the bit. With a bias y / c
                # isn't P, so that P is kept: one more tensor of (tokens, out), by the biased layers alone.
                shift_O = (1 - ratio_O) * bias_O
                straight_TO = y_TO - bias_O.to(y_TO.dtype) if learns else None
            elif learns:
                ratio_O = ratio_O.abs().clamp_min_(_LEAST_RATIO).copysign_(ratio_O)
                # The range of float16 is too small for what is tiny by a tiny factor. Under checkpointing, too: what a
                # node keeps besides autograd would outlive the first forward, so that there P is saved, and dropped
                # with all else.
                if saving_is_hooked() or y_TO.dtype == torch.float16:
                    straight_TO = y_TO.clone()
            scale_columns(y_TO, ratio_O, shift_O, out=y_TO)
        saved_TI = None if settings.maker else x_TI
        ctx.save_for_backward(saved_TI, settings.kept(weight_OI), a_RI, b_OR, z_TR, ratio_O, norms_O, straight_TO)
        ctx.settings = settings
        # Not by save_for_backward: an output that is changed in place afterwards is no error.
        is_kept = learns and straight_TO is None and not y_TO.is_inference()
        ctx.output_TO, ctx.version = (y_TO.detach(), y_TO._version) if is_kept else (None, None)
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *received: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = received
        x_TI, weight_OI, a_RI, b_OR, z_TR, ratio_O, norms_O, straight_TO = ctx.saved_tensors
        settings: Pass = ctx.settings
        output_TO, ctx.output_TO = ctx.output_TO, None
        needs_x, _, needs_bias, needs_a, needs_b, needs_magnitude = ctx.needs_input_grad[:6]
        gratio_O = None
        with no_autocast(gradient.device.type):
            x_TI = settings.input(x_TI)
            g_TO = gradient.reshape(-1, gradient.shape[-1]).to(settings.dtype)
            # dc_o = sum_t g_to P_to, with P = y / c. The version tells whether y is still what was computed: whoever
            # changed it in place, as a residual that is added so, changed P with it, and then P is computed once more.
            if needs_magnitude and output_TO is not None and output_TO._version == ctx.version:
                gratio_O = column_dots(g_TO, output_TO) / ratio_O
            elif needs_magnitude:
                if straight_TO is None:
                    straight_TO, _ = products(x_TI, settings.weight(weight_OI), None, a_RI, b_OR, settings)
                gratio_O = column_dots(g_TO, straight_TO)
            gbias_O = g_TO.sum(0) if needs_bias else None
            # c * g or c * W, of which one is smaller.
            few_tokens = needs_x and x_TI.shape[0] < x_TI.shape[1]
            if few_tokens:
                g_TO = scale_columns(g_TO, ratio_O)
            else:
                b_OR = b_OR * ratio_O[:, None]
                if needs_x:
                    # A weight that was expanded for this call may be written over; the model's own may not.
                    own_OI = settings.weight(weight_OI)
                    weight_OI = scale_rows(own_OI, ratio_O, out=None if settings.dequantizer is None else own_OI)
            needed = needs_x, needs_a, needs_b
            gx, ga_RI, gb_OR = gradients(g_TO, x_TI, z_TR, weight_OI, a_RI, b_OR, settings, needed)
            if gb_OR is not None and not few_tokens:
                # `gradients` was given c B; of B itself the gradient has that factor once more.
                gb_OR.mul_(ratio_O[:, None])
        gmagnitude_O = None
        if gratio_O is not None:
            # c = m / n with n a constant, as the paper has it: dm = dc / n. A row of zeros has c = 1 whatever m is.
            gmagnitude_O = torch.where(norms_O == 0, 0.0, gratio_O / norms_O).to(norms_O.dtype)
        return gx, None, gbias_O, ga_RI, gb_OR, gmagnitude_O, None, None, None
