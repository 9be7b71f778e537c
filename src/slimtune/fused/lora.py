"""LoRA on a frozen linear layer in one autograd node.

Forward adds the base's product onto the low-rank term in place; backward does so for the input's gradient. Saved are
the input (shared with the siblings that read it) and the (tokens, r) product; dropout masks are drawn again from their
seed instead of being kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from slimtune.bases import base_of
from slimtune.bases.dense import DenseLinear
from slimtune.bases.packed import PackedLinear
from slimtune.core.delta import Delta
from slimtune.core.frozen import Frozen
from slimtune.fused import fuses
from slimtune.methods.lora.layers import LoraLinear
from slimtune.ops.autograd import PLAIN_TENSORS, made_again, maker_of, no_autocast

MOST_TOKENS = 16
"""Where a node catches up with the plain formula, on two cores."""


@fuses(LoraLinear, PackedLinear)
@fuses(LoraLinear, DenseLinear)
def lora_linear(delta: LoraLinear, module: Any, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`base(x) + s * B(A(dropout(x)))`, fused where the base is a plain frozen product."""
    # The plain formula is the definition: what a node doesn't know runs there, and a test holds the two equal.
    if args or kwargs or stays_plain(delta, module, base, x):
        return delta.forward(base, x, *args, **kwargs)
    settings = this_pass(base, x, delta.scaling, delta.lora_dropout if delta.training else 0.0)
    # W and b are arguments of the node and not read inside: b may be a trained copy, which needs its gradient.
    y_TO: Any = _LoraLinear.apply(x, base.weight, delta.biased(base.bias), *delta.pair, settings)
    return settings.output(y_TO)


@dataclass(frozen=True)
class Pass:
    """What a forward decides and its backward follows.

    Attributes:
        dtype: what the products are computed in.
        maker: the node that makes the input again, where it need not be saved.
        dequantizer: what expands a weight that isn't saved.
        y_dtype: what the output is given back in.
    """

    scaling: float
    dropout: float
    seed: int
    dtype: torch.dtype
    shape: torch.Size
    x_dtype: torch.dtype
    maker: Any
    dequantizer: Callable[[], Tensor] | None
    y_dtype: torch.dtype

    def output(self, y_TO: Tensor) -> Tensor:
        """The output in its shape and dtype; not inside a node, whose views can't be changed in place."""
        return y_TO.view(*self.shape[:-1], y_TO.shape[-1]).to(self.y_dtype)

    def kept(self, weight_OI: Tensor) -> Tensor | None:
        """What is saved of the weight."""
        # An expanded weight, (out, in) in 16 bits for each layer, would be the unquantized model again until backward.
        return weight_OI if self.dequantizer is None else None

    def weight(self, kept_OI: Tensor | None) -> Tensor:
        """The weight again, in the dtype of the products."""
        weight_OI = self.dequantizer() if kept_OI is None and self.dequantizer else kept_OI
        return torch.as_tensor(weight_OI).to(self.dtype)

    def mask(self, x_TI: Tensor) -> tuple[Tensor | None, float]:
        """The dropout mask, the same at each call, and the probability to stay."""
        return keep_mask(x_TI, self.dropout, self.seed) if self.dropout else (None, 1.0)

    def input(self, saved_TI: Tensor | None) -> Tensor:
        """The input x_TI again."""
        if saved_TI is not None:
            return saved_TI
        return made_again(self.maker).reshape(-1, self.shape[-1]).to(self.dtype)


def this_pass(base: Frozen, x: Tensor, scaling: float, dropout: float) -> Pass:
    """The settings of a forward that starts now."""
    dequantizer, dtype = base.base.dequantizer(base.module), base.base.spec(base.module).dtype
    # A dense layer answers in the dtype of its weight, a packed one in that of its input; autocast wins over both.
    y_dtype = dtype if dequantizer is None else x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = y_dtype = torch.get_autocast_dtype(x.device.type)
    seed = _draw_seed() if dropout else 0
    return Pass(scaling, dropout, seed, dtype, x.shape, x.dtype, maker_of(x), dequantizer, y_dtype)


def stays_plain(delta: Delta, module: Any, base: Frozen, x: Any) -> bool:
    """Whether a node can't take this call, or would be most of its work."""
    return is_decoding(delta, base, x) or not is_plain(module, x) or bool(base.base.for_few_tokens(module, x))


def is_plain(module: Any, x: Any) -> bool:
    return type(x) in PLAIN_TENSORS and x.is_floating_point() and base_of(module).may_fuse(module)


def is_decoding(delta: Delta, base: Frozen, x: Tensor) -> bool:
    """Whether so few tokens pass an adapter at rest that a node, and factors cast for it, would be most of the work."""
    at_rest = not (torch.is_grad_enabled() or delta.training) and x.numel() <= MOST_TOKENS * x.shape[-1]
    own = next(delta.parameters(), None)  # a tied layer has none of its own
    # An expanded weight's product is rounded once, with the low-rank term in it.
    return at_rest and own is not None and x.dtype != own.dtype and base.base.dequantizer(base.module) is None


def _draw_seed() -> int:
    # From the CPU's generator, which gradient checkpointing restores: the recomputed mask is the first one.
    return int(torch.empty((), dtype=torch.int64).random_())


def keep_mask(x: Tensor, dropout: float, seed: int) -> tuple[Tensor, float]:
    """Ones where x stays and zeros where it is dropped, the same for a seed, and the probability to stay."""
    if x.device.type != "cpu":
        generator = torch.Generator(device=x.device).manual_seed(seed)
        return torch.empty_like(x).bernoulli_(1 - dropout, generator=generator), 1 - dropout
    # torch draws serially and needs a draw an element; here one of 64 bits serves four, to a resolution of 2^-15.
    words = _random_words(4 * ((x.numel() + 3) // 4), seed, x)
    # One step at least, or a small probability would be none. The divisor is the rounded probability to stay, so that
    # the mean of the output is right to the last digit.
    dropped = max(1, round(dropout * 2**15))
    # 15 uniform bits v become v < dropped ? 0 : 1, in place: a comparison would make a mask of another dtype.
    keep = words.bitwise_and_(2**15 - 1).sub_(dropped - 1).clamp_(0, 1)
    return keep[: x.numel()].view(x.shape), 1 - dropped / 2**15


def _random_words(count: int, seed: int, like: Tensor) -> Tensor:
    """So many random numbers of 16 bits; memory is planned without drawing them."""
    if isinstance(like, FakeTensor):
        return like.new_empty(count, dtype=torch.int16)
    return torch.from_numpy(np.random.SFC64(seed).random_raw(count // 4).view(np.int16))


def apply_mask(x: Tensor, keep: Tensor) -> Tensor:
    """x where the mask is one, zero elsewhere."""
    if keep.dtype == torch.int16 and x.element_size() == 2:
        # Bits times one or zero: far faster than a product of mixed dtypes.
        return (x.view(torch.int16) * keep).view(x.dtype)
    return x * keep.to(x.dtype)


def products(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, settings: Pass
) -> tuple[Tensor, Tensor]:
    """y = x W^T + b + s z B^T and z = dropout(x) A^T."""
    dtype = settings.dtype
    keep, probability = settings.mask(x_TI)
    # (tokens, in), not saved: backward makes it again from x, which is saved anyway, and the seed.
    kept_TI = x_TI if keep is None else apply_mask(x_TI, keep)
    z_TR = kept_TI @ a_RI.to(dtype).t()
    if keep is not None:
        # 1 / p on the (tokens, r) product: the same as on the (tokens, in) input, for a small part of the work.
        z_TR.div_(probability)
    b_RO, weight_IO = b_OR.to(dtype).t(), weight_OI.to(dtype).t()
    # (tokens, out) in the base's dtype (ADR 6); the plain formula makes two more of its size.
    if bias_O is None and dtype.itemsize < 4:
        # The low-rank term first, and the base's product onto it, whose sums are in float32 and rounded once with the
        # term in them. Onto a product that is rounded already, a term below half a digit of it is lost (ADR 26).
        return ((z_TR * settings.scaling) @ b_RO).addmm_(x_TI, weight_IO), z_TR
    # In 32 bits as `peft` adds them. With a bias so too, as the base's own product is rounded once with the bias in it:
    # at the start the output is the base's to the bit.
    y_TO = F.linear(x_TI, weight_IO.t(), None if bias_O is None else bias_O.to(dtype))
    return y_TO.addmm_(z_TR, b_RO, alpha=settings.scaling), z_TR


def gradients(
    g_TO: Tensor, x_TI: Tensor, z_TR: Tensor, weight_OI: Tensor | None, a_RI: Tensor, b_OR: Tensor, settings: Pass,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of x, A and B in `products`, each where it is needed."""
    gx_TI = ga_RI = gb_OR = None
    dtype = settings.dtype
    keep, probability = settings.mask(x_TI)
    # s and 1 / p go into the (tokens, r) gradient once, for A and for x.
    gz_TR = (g_TO @ b_OR.to(dtype)).mul_(settings.scaling / probability)
    if needed[2]:
        # The sum over tokens runs in the base's dtype, whose products accumulate in float32; the small result is
        # widened.
        gb_OR = (g_TO.t() @ z_TR).to(b_OR.dtype).mul_(settings.scaling)
    if needed[1]:
        ga_RI = (gz_TR.t() @ (x_TI if keep is None else apply_mask(x_TI, keep))).to(a_RI.dtype)
    if needed[0]:
        # As in forward. Dropout masks the low-rank part by itself, as W saw all of x.
        if keep is None and dtype.itemsize >= 4:
            gx_TI = (g_TO @ settings.weight(weight_OI)).addmm_(gz_TR, a_RI.to(dtype))
        else:
            gx_TI = gz_TR @ a_RI.to(dtype)
            gx_TI = gx_TI if keep is None else apply_mask(gx_TI, keep)
            gx_TI.addmm_(g_TO, settings.weight(weight_OI))
    gx = None if gx_TI is None else gx_TI.view(settings.shape).to(settings.x_dtype)
    return gx, ga_RI, gb_OR


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, settings: Pass
    ) -> Tensor:
        with no_autocast(x.device.type):
            x_TI = x.reshape(-1, x.shape[-1]).to(settings.dtype)
            y_TO, z_TR = products(x_TI, weight_OI, bias_O, a_RI, b_OR, settings)
        # x is one tensor for all siblings that read it (query, key and value), so that it is kept once; z is small.
        ctx.save_for_backward(None if settings.maker else x_TI, settings.kept(weight_OI), a_RI, b_OR, z_TR)
        ctx.settings = settings
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *received: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = received
        x_TI, weight_OI, a_RI, b_OR, z_TR = ctx.saved_tensors
        settings: Pass = ctx.settings
        needs_x, _, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        with no_autocast(gradient.device.type):
            # Where a gate, a norm or a GELU made x, its node makes it again here instead of x being kept since the
            # forward.
            x_TI = settings.input(x_TI)
            g_TO = gradient.reshape(-1, gradient.shape[-1]).to(settings.dtype)
            needed = needs_x, needs_a, needs_b
            gx, ga_RI, gb_OR = gradients(g_TO, x_TI, z_TR, weight_OI, a_RI, b_OR, settings, needed)
            gbias_O = g_TO.sum(0) if needs_bias else None
        return gx, None, gbias_O, ga_RI, gb_OR, None
