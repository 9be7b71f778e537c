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
    settings = delta.scaling, dropout, seed, dtype, _product(x)
    return _LoraLinear.apply(x, weight_OI, bias, *factors, *settings)  # type: ignore[return-value]


def _product(x: Tensor) -> Any:
    """The autograd node of an input that is the product of two tensors, as behind a gated activation.

    The node keeps both for its own backward, which comes after ours: the product need not be kept beside them.
    """
    node: Any = x.grad_fn
    # Under checkpointing what a node keeps can be asked for only once.
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore[reportAttributeAccessIssue]
    if node is None or hooked or node.name() != "MulBackward0":
        return None
    return node if all(function for function, _ in node.next_functions) else None


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


def keep_mask(x: Tensor, dropout: float, seed: int) -> Tensor:
    """What dropout multiplies x with, in x's dtype: zero, or one over the probability to stay; the same for a seed."""
    generator = torch.Generator(device=x.device).manual_seed(seed)
    if x.device.type != "cpu":
        return torch.empty_like(x).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
    # The CPU's generator is serial: one 64-bit draw serves four elements, to a resolution of 2^-16.
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    dropped = round(dropout * 2**16)
    keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return keep.to(x.dtype).div_(1 - dropped / 2**16)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor,
        scaling: float, dropout: float, seed: int, dtype: torch.dtype, product: Any,
    ) -> Tensor:  # fmt: skip
        with torch.autocast(x.device.type, enabled=False):
            x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
            bias_O = None if bias_O is None else bias_O.to(dtype)
            y_TO = F.linear(x_TI, weight_OI.to(dtype), bias_O)
            kept_TI = x_TI * keep_mask(x_TI, dropout, seed) if dropout else x_TI
            z_TR = kept_TI @ a_RI.to(dtype).t()
            y_TO.addmm_(z_TR, b_OR.to(dtype).t(), alpha=scaling)
        ctx.save_for_backward(None if product else x_TI, weight_OI, a_RI, b_OR, z_TR)
        ctx.settings = scaling, dropout, seed, dtype, x.shape, x.dtype, product
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = gradients
        x_TI, weight_OI, a_RI, b_OR, z_TR = ctx.saved_tensors
        scaling, dropout, seed, dtype, shape, x_dtype, product = ctx.settings
        _, _, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        gx_TI = ga_RI = gb_OR = None
        with torch.autocast(gradient.device.type, enabled=False):
            if product:
                x_TI = (product._saved_self * product._saved_other).reshape(-1, shape[-1]).to(dtype)
            g_TO = gradient.reshape(-1, gradient.shape[-1]).to(dtype)
            gz_TR = (g_TO @ b_OR.to(dtype)).mul_(scaling)
            keep = keep_mask(x_TI, dropout, seed) if dropout else None
            if needs_b:
                gb_OR = (g_TO.t() @ z_TR).to(b_OR.dtype).mul_(scaling)
            if needs_a:
                ga_RI = (gz_TR.t() @ (x_TI if keep is None else x_TI * keep)).to(a_RI.dtype)
            if ctx.needs_input_grad[0]:
                gx_TI = g_TO @ weight_OI.to(dtype)
                if keep is None:
                    gx_TI.addmm_(gz_TR, a_RI.to(dtype))
                else:
                    gx_TI.addcmul_(gz_TR @ a_RI.to(dtype), keep)
            gbias_O = g_TO.sum(0) if needs_bias else None
        gx = None if gx_TI is None else gx_TI.view(shape).to(x_dtype)
        return gx, None, gbias_O, ga_RI, gb_OR, None, None, None, None, None
