"""What the methods of LyCORIS share (Yeh et al. 2023, arXiv:2309.14859): an update s * dW of the weight, s = alpha / r.

y = base(x) + s * dW(x);  LoHa and LoKr differ in what dW is made of
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slimtune.core.config import LayeredConfig
from slimtune.core.delta import Delta, added, trainable_dtype
from slimtune.core.frozen import Dense, Frozen, Site
from slimtune.core.patterns import by_pattern
from slimtune.errors import check_choice, check_number, check_whole
from slimtune.ops.autograd import is_traced


@dataclass
class LycorisConfig(LayeredConfig):
    """What LoHa and LoKr share; names, defaults and meanings are those of `peft`.

    `rank_dropout` drops outputs of the update while training, `module_dropout` the update of a whole layer.
    `rank_pattern` and `alpha_pattern` map a module's name or an expression to another `r` or `alpha`.
    `use_effective_conv2d` gives the kernel of a convolution a small core tensor of its own.

    Raises:
        ConfigError: an unknown field, a value out of range, fields that exclude each other.
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    learning_rate: ClassVar[float] = 1e-3
    initialisations: ClassVar[tuple[bool | str, ...]] = (True, False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            check_whole(name, rank)
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            check_number(name, alpha)
        check_number("rank_dropout", self.rank_dropout, 0, 1)
        check_number("module_dropout", self.module_dropout, 0, 1)
        check_choice("use_effective_conv2d", self.use_effective_conv2d, (True, False))
        check_choice("init_weights", self.init_weights, self.initialisations)

    def rank_for(self, name: str) -> int:
        return by_pattern(self.rank_pattern, name, self.r)

    def alpha_for(self, name: str) -> float:
        return by_pattern(self.alpha_pattern, name, self.alpha)


class LycorisDelta(Delta):
    """y = base(x) + s * dW(x), with dW in the shape of the base's weight.

    Attributes:
        scaling: the factor s.
        shape: the shape of the weight, (out, in, ...).
    """

    rescales_kept: bool = True
    """Whether rank dropout enlarges the outputs that it keeps."""

    def __init__(self, site: Site, config: LycorisConfig) -> None:
        super().__init__()
        self.r = config.rank_for(site.name)
        # Fixed here and not looked up in each call: patterns are matched by regular expressions.
        self.scaling = config.alpha_for(site.name) / self.r
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout
        self.shape = tuple(site.spec.shape)
        self.has_core = config.use_effective_conv2d and math.prod(self.shape[2:]) > 1

    def add_factors(self, site: Site, autocast: bool, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Register the factors of dW by name."""
        weight = site.spec
        dtype = trainable_dtype(weight.dtype, autocast)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype)))

    def core_shape(self) -> tuple[int, ...]:
        """The core of a convolution's factors, (r, r, kernel...); in one dimension the kernel counts as (k, 1)."""
        kernel = self.shape[2:]
        return (self.r, self.r, *kernel, 1) if len(kernel) == 1 else (self.r, self.r, *kernel)

    @property
    def factors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._parameters]

    @abstractmethod
    def update(self, *factors: Tensor) -> Tensor:
        """s * dW as (out, in, ...)."""

    @abstractmethod
    def change(self, module: Any, x: Tensor) -> Tensor:
        """s * dW(x)."""

    def forward(self, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = base(x, *args, **kwargs)
        if self.skips():
            return y
        change = self.change(base.module, x)
        if self.training and self.rank_dropout:
            # (out,) meets the last axis of a linear layer's output, and the second of a convolution's, behind which its
            # kernel's axes follow.
            kept_O = self.kept_rows().to(change)
            change = change * (kept_O if len(self.shape) == 2 else kept_O.view(-1, *[1] * len(self.shape[2:])))
        return (y + change).to(y.dtype)

    def skips(self) -> bool:
        """Whether module dropout leaves the layer's update out this time."""
        # One number a layer and call, from the CPU's generator: no device is waited for.
        return bool(self.training and self.module_dropout and torch.rand(1).item() <= self.module_dropout)

    def kept_rows(self) -> Tensor:
        """One for each output that rank dropout keeps, enlarged by what it drops, and zero for the others."""
        # (out,): an output's whole update is kept or dropped, for all tokens of the call.
        kept_O = (torch.rand(self.shape[0]) > self.rank_dropout).float()
        # By the part that was really kept, not by its expectation, as in `peft`; if none is, zeros stay zeros.
        return kept_O / kept_O.mean().clamp_min(1 / len(kept_O)) if self.rescales_kept else kept_O

    def fold(self, dense: Dense) -> Dense:
        return added(dense, self.update(*self.factors))

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


def from_core(core: Tensor, a_RO: Tensor, b_RI: Tensor) -> Tensor:
    """sum_ij core_ij... a_iO b_jI as (O, I, ...)."""
    return torch.einsum("ij...,iO,jI->OI...", core, a_RO, b_RI)


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors), of which nothing but the tensors is kept until the backward pass.

    What the factors of an update multiply to is larger than they are, and cheap to make again.
    """
    if is_traced() or not torch.is_grad_enabled():
        return function(*tensors)
    # A product of small factors is as large as W: without this, autograd would keep one for each layer.
    return _Recomputed.apply(function, *tensors)  # type: ignore[return-value]


def updated_product(
    update: Callable[..., Tensor], x: Tensor, weight_OI: Tensor | None, bias_O: Tensor | None, *factors: Tensor
) -> Tensor:
    """x (W + s dW)^T + b, or x (s dW)^T without W; kept until the backward pass are x, W, and the factors of s dW.

    In 16 bits the sum would be rounded to W: there the products are two.
    """
    if is_traced():
        update_OI = update(*factors)
        return F.linear(x.to(update_OI.dtype), update_OI if weight_OI is None else update_OI + weight_OI, bias_O)
    # Two dimensions inside: `addmm_` takes matrices alone, and batches are only more tokens.
    y_TO: Any = _UpdatedProduct.apply(update, x.reshape(-1, x.shape[-1]), weight_OI, bias_O, *factors)
    # Not inside: what a custom function returns as a view can't be changed in place.
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


class _UpdatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, update: Any, x_TI: Tensor, weight_OI: Tensor | None, bias_O: Tensor | None, *factors: Tensor
    ) -> Tensor:
        # The (out, in) update isn't among them; it is made again in backward from the factors, which are far smaller.
        ctx.save_for_backward(x_TI, weight_OI, *factors)
        # The backward pass makes the update again, and under the same autocast, or it would be another one.
        ctx.update, ctx.autocast = update, _autocast(x_TI.device.type)
        if weight_OI is not None and would_swallow(weight_OI):
            # 16 bits: two products into one tensor. dW is made in float32 and rounded once (ADR 6). W's product comes
            # last, so that one rounding is of both; with a bias first, as in LoRA (ADR 26).
            update_IO = update(*factors).to(x_TI.dtype).t()
            if bias_O is None:
                return (x_TI @ update_IO).addmm_(x_TI, weight_OI.t())
            return F.linear(x_TI, weight_OI, bias_O).addmm_(x_TI, update_IO)
        update_OI = update(*factors)
        if weight_OI is not None:
            # 32 bits: W + s dW, and one product; in the memory of the update, unless W lies the other way round, as in
            # Conv1D: numbers in another order go through another kernel, and a fresh adapter must change no bit.
            update_OI = update_OI.to(weight_OI.dtype)
            room = update_OI if weight_OI.is_contiguous() else torch.empty_like(weight_OI)
            update_OI = torch.add(weight_OI, update_OI, out=room)
        return F.linear(x_TI.to(update_OI.dtype), update_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TI, weight_OI, *factors = ctx.saved_tensors
        (g_TO,), device = gradients, x_TI.device.type
        leaves = [factor.detach().requires_grad_() for factor in factors]
        with torch.enable_grad(), torch.autocast(device, *ctx.autocast):
            update_OI = ctx.update(*leaves)
        _, needs_x, _, needs_bias, *needed = ctx.needs_input_grad
        of_factors: Any = [None] * len(factors)
        with torch.autocast(device, enabled=False):
            if any(needed):
                # The gradient of dW, (out, in); autograd takes it on to the factors through the update that was made
                # again.
                of_update_OI = (g_TO.t() @ x_TI.to(g_TO.dtype)).to(update_OI.dtype)
                of_factors = torch.autograd.grad(update_OI, leaves, of_update_OI)
            gx_TI, update_OI = None, update_OI.detach()
            if needs_x and weight_OI is not None and would_swallow(weight_OI):
                # As in forward: in 16 bits W and dW each have a product.
                gx_TI = (g_TO @ update_OI.to(g_TO.dtype)).addmm_(g_TO, weight_OI)
            elif needs_x:
                sum_OI = update_OI if weight_OI is None else update_OI.to(weight_OI.dtype).add_(weight_OI)
                gx_TI = (g_TO @ sum_OI.to(g_TO.dtype)).to(x_TI.dtype)
        # No gradient for W, the third: it is frozen, and its (out, in) gradient would be the largest tensor of all.
        return None, gx_TI, None, g_TO.sum(0) if needs_bias else None, *of_factors


def would_swallow(weight: Tensor) -> bool:
    """Whether a small change is lost in a sum with the weight, so that each has a product of its own."""
    return weight.dtype.itemsize < 4


def _autocast(device: str) -> tuple[torch.dtype, bool]:
    return torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        device = tensors[0].device.type
        ctx.save_for_backward(*tensors)
        ctx.function, ctx.device = function, device
        ctx.autocast = _autocast(device)
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needed = ctx.needs_input_grad[1:]
        # New leaves: the graph that is built here ends at them and is gone after this call.
        leaves = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad(), torch.autocast(ctx.device, *ctx.autocast):
            result = ctx.function(*leaves)
        of_leaves = iter(torch.autograd.grad(result, [leaf for leaf in leaves if leaf.requires_grad], gradients))
        return None, *(next(of_leaves) if need else None for need in needed)
