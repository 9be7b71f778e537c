"""A root mean square norm with a frozen weight, of which only its input and a number a token are saved.

y = w * x / sqrt(mean(x^2) + eps), in float32 inside. Autograd would keep x in float32. The output can be computed
again, so that layers which read it need not save it either. Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes


@dataclass(frozen=True)
class Formula:
    """How a kind of norm multiplies by its weight.

    Attributes:
        epsilon: the attribute that holds eps.
        offset: what is added to the weight.
        rounds_first: whether x is rounded to its own dtype before it is multiplied.
    """

    epsilon: str
    offset: float
    rounds_first: bool

    def scale(self, weight_D: Tensor) -> Tensor:
        return self.offset + weight_D.float() if self.offset else weight_D

    def output(self, h: Tensor, weight_D: Tensor) -> Tensor:
        """The norm, of x / sqrt(mean(x^2) + eps) in float32."""
        dtype = weight_D.dtype
        return (self.scale(weight_D) * (h.to(dtype) if self.rounds_first else h)).to(dtype)

    def gradient(self, g: Tensor, weight_D: Tensor) -> Tensor:
        """The gradient of x * rate in float32."""
        # Llama's norm multiplies in 16 bits, after the rounding, so that its gradient is rounded there as well.
        scaled = g * weight_D if self.rounds_first else g.float() * self.scale(weight_D)
        return scaled.float()


EPSILONS = ("variance_epsilon", "eps", "epsilon")
FORMULAS = ((0.0, True), (0.0, False), (1.0, False))
"""Offset and `rounds_first`: as in Llama, in OLMo, in Gemma."""

# By class: all norms of a model are of one or two, and each is tried once in a process.
_formulas: dict[type, Formula | None] = {}


def formula_of(module: nn.Module) -> Formula | None:
    """The formula of a norm, found by what its forward computes; None if it is none of these."""
    kind = getattr(type(module), "adopted_from", type(module))
    if kind not in _formulas:
        _formulas[kind] = _formula_by_trial(module, kind)
    return _formulas[kind]


def _formula_by_trial(module: nn.Module, kind: type[nn.Module]) -> Formula | None:
    parameters = dict(module.named_parameters())
    epsilon = next((name for name in EPSILONS if isinstance(getattr(module, name, None), float)), None)
    alone = not (module._modules or module._buffers) and list(parameters) == ["weight"]
    if not alone or epsilon is None or parameters["weight"].dim() != 1:
        return None
    for offset, rounds_first in FORMULAS:
        formula = Formula(epsilon, offset, rounds_first)
        # bfloat16 tells where the class rounds, Llama's formula from OLMo's, which are equal in float32; float32 tells
        # that it does nothing else. There is no list of classes (ADR 18).
        if all(_is_computed_by(module, kind, formula, dtype) for dtype in (torch.bfloat16, torch.float32)):
            return formula
    return None


@torch.no_grad()
def _is_computed_by(module: nn.Module, kind: type[nn.Module], formula: Formula, dtype: torch.dtype) -> bool:
    """Whether the class's forward gives what the formula does, to the bit."""
    width = module.get_parameter("weight").shape[0]
    # Neither with tensors without data, nor in anyone's count of operations: a class is tried once in a process.
    with _disable_current_modes(), torch.device("cpu"):
        weight_D = torch.linspace(-1, 2, width).to(dtype)
        x = torch.linspace(-3, 5, 3 * width).sin().to(dtype).view(1, 3, width)
        own = module._parameters["weight"]
        module._parameters["weight"] = weight_D  # type: ignore[assignment]
        try:
            y = kind.forward(module, x)
        except (TypeError, AttributeError, RuntimeError, ValueError):
            return False
        finally:
            module._parameters["weight"] = own
        expected = formula.output(normalised(x, getattr(module, formula.epsilon))[0], weight_D)
        return isinstance(y, Tensor) and y.dtype == dtype and torch.equal(y, expected)


def normalised(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """h = x * rate in float32, and rate = 1 / sqrt(mean(x^2) + eps) of each token."""
    # A copy even of float32, as it is written over below.
    x = x.to(torch.float32, copy=True)
    rate = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    return x.mul_(rate), rate


def frozen_norm(x: Tensor, weight_D: Tensor, epsilon: float, formula: Formula) -> Tensor:
    """The norm of x over its last dimension, in the dtype that x and the weight share."""
    y: Any = _FrozenNorm.apply(x, weight_D, epsilon, formula)
    return y


class _FrozenNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float, formula: Formula) -> Tensor:
        h, rate = normalised(x, epsilon)
        # x as it came and one float32 number a token. Autograd's own formula keeps x in float32 and the output once
        # more for the layers that read it; with the gates, that was 1.64 against 1.36 GB at the peak of a QLoRA step
        # (ADR 18).
        ctx.save_for_backward(x, weight_D, rate)
        ctx.formula, ctx.again, ctx.output = formula, _again, None
        return formula.output(h, weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *received: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,) = received
        ctx.output = None
        x, weight_D, rate = ctx.saved_tensors
        # h = x * rate, so that dx = rate * (dh - x * rate^2 * <dh, x> / D).
        gh, xf = ctx.formula.gradient(g, weight_D), x.float()
        along = torch.linalg.vecdot(gh, xf).unsqueeze(-1).mul_(rate * rate / -x.shape[-1])
        return gh.addcmul_(xf, along).mul_(rate).to(x.dtype), None, None, None


def _again(node: Any) -> Tensor:
    """The output, kept from the first reader that asks until the node's own backward."""
    if node.output is None:
        x, weight_D, rate = node.saved_tensors
        # Query, key and value all read this output: made for the first and kept for the others.
        node.output = node.formula.output(x.to(torch.float32, copy=True).mul_(rate), weight_D)
    return node.output
