"""LoRA on a dense linear layer in one autograd node.

Forward adds the low-rank term into the base's product in place; backward adds its part into the input's gradient in
place. Saved are the input (shared with the siblings that read it) and the (tokens, r) product; dropout masks are drawn
again from their seed instead of being kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slimtune.bases import base_of
from slimtune.bases.dense import DenseLinear
from slimtune.methods.lora import LoraLinear
from slimtune.ops import fuses

_PLAIN_TENSORS = (Tensor, nn.Parameter)


@fuses(LoraLinear, DenseLinear)
def lora_linear(delta: LoraLinear, module: Any, base: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`base(x) + s * B(A(dropout(x)))`, fused where the base is a plain frozen product."""
    if args or kwargs or not _is_plain(module, x):
        return delta.forward(base, x, *args, **kwargs)
    weight_OI = base_of(type(module)).weight(module)
    dtype = weight_OI.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    dropout = delta.lora_dropout if delta.training else 0.0
    seed = _draw_seed() if dropout else 0
    bias: Any = module.bias
    factors = (delta.lora_A, delta.lora_B)
    return _LoraLinear.apply(x, weight_OI, bias, *factors, delta.scaling, dropout, seed, dtype)  # type: ignore[return-value]


def _is_plain(module: Any, x: Any) -> bool:
    weight = module.weight
    return (
        type(weight) in _PLAIN_TENSORS
        and type(x) in _PLAIN_TENSORS
        and x.is_floating_point()
        and weight.is_floating_point()
        and not weight.requires_grad
        and base_of(type(module)).forward_is_plain(module)
        and not torch.compiler.is_compiling()
    )


def _draw_seed() -> int:
    # From the CPU's generator, which gradient checkpointing restores: the recomputed mask is the first one.
    return int(torch.empty((), dtype=torch.int64).random_())


def keep_mask(x: Tensor, dropout: float, seed: int) -> tuple[Tensor, float]:
    """A mask of the elements that stay, the same for the same seed, and the probability with which each stays."""
    generator = torch.Generator(device=x.device).manual_seed(seed)
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout, generator=generator), 1 - dropout
    # The CPU's generator is serial: one 64-bit draw serves four elements, to a resolution of 2^-16.
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    dropped = round(dropout * 2**16)
    keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return keep, 1 - dropped / 2**16


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor,
        scaling: float, dropout: float, seed: int, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        with torch.autocast(x.device.type, enabled=False):
            x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
            bias_O = None if bias_O is None else bias_O.to(dtype)
            y_TO = F.linear(x_TI, weight_OI.to(dtype), bias_O)
            z_TR = _dropped(x_TI, dropout, seed) @ a_RI.to(dtype).t()
            y_TO.addmm_(z_TR, b_OR.to(dtype).t(), alpha=scaling)
        ctx.save_for_backward(x_TI, weight_OI, a_RI, b_OR, z_TR)
        ctx.settings = scaling, dropout, seed, dtype, x.shape, x.dtype
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = gradients
        x_TI, weight_OI, a_RI, b_OR, z_TR = ctx.saved_tensors
        scaling, dropout, seed, dtype, shape, x_dtype = ctx.settings
        with torch.autocast(gradient.device.type, enabled=False):
            g_TO = gradient.reshape(-1, gradient.shape[-1]).to(dtype)
            gz_TR = (g_TO @ b_OR.to(dtype)).mul_(scaling)
            gb_OR = (g_TO.t() @ z_TR).to(b_OR.dtype).mul_(scaling) if ctx.needs_input_grad[4] else None
            ga_RI = None
            if ctx.needs_input_grad[3]:
                ga_RI = (gz_TR.t() @ _dropped(x_TI, dropout, seed)).to(a_RI.dtype)
            gx = None
            if ctx.needs_input_grad[0]:
                gx_TI = g_TO @ weight_OI.to(dtype)
                if dropout:
                    keep, probability = keep_mask(x_TI, dropout, seed)
                    gx_TI.add_((gz_TR @ a_RI.to(dtype)).mul_(keep), alpha=1 / probability)
                else:
                    gx_TI.addmm_(gz_TR, a_RI.to(dtype))
                gx = gx_TI.view(shape).to(x_dtype)
            gbias_O = g_TO.sum(0) if ctx.needs_input_grad[2] else None
        return gx, None, gbias_O, ga_RI, gb_OR, None, None, None, None


def _dropped(x_TI: Tensor, dropout: float, seed: int) -> Tensor:
    if not dropout:
        return x_TI
    keep, probability = keep_mask(x_TI, dropout, seed)
    return (x_TI * keep).div_(probability)
