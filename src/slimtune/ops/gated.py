"""The product behind a gate, a(gate) * up, of which only `gate` and `up` are saved.

Autograd would keep a(gate) besides, as large as either. Which product an activation goes into is known to the forward
of the model alone: the activation gives back a `LazyActivation`, and a product with a tensor of its kind is computed
in one node. Every other use makes it the real tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtune.ops.autograd import PLAIN_TENSORS
from slimtune.ops.lazy import Lazy

Activation = Callable[[Tensor], Tensor]


class LazyActivation(Lazy):
    """`activation(gate)`, not computed yet."""

    def __init__(self, gate: Tensor, activation: Activation) -> None:
        self._gate, self._activation = gate, activation

    def computed(self) -> Tensor:
        return self._activation(self._gate)

    def __mul__(self, up: Any) -> Any:
        # Another shape would broadcast and another dtype promote, for which the node has no backward.
        is_alike = type(up) in PLAIN_TENSORS and up.shape == self._gate.shape and up.dtype == self._gate.dtype
        # Once something has looked at it, the real activation is in the graph, and a second way to it saves nothing.
        if self._real is not None or not is_alike:
            return self.tensor() * up
        return _Gated.apply(self._gate, up, self._activation)

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__) and not kwargs and len(args) == 2:
            up, lazy = args if isinstance(args[1], cls) else args[::-1]
            if isinstance(lazy, cls) and not isinstance(up, cls):
                return lazy * up
        return super().__torch_function__(func, types, args, kwargs)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        # Both are there anyway, as outputs of the two projections; a(gate), as large, is what isn't kept (ADR 18).
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.again, ctx.opened = activation, _again, None
        return activation(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *received: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,) = received
        # Asked for once: more often is refused under checkpointing.
        gate, up = ctx.saved_tensors
        leaf, opened = ctx.opened or _opened(ctx, gate)
        ctx.opened = None
        g_up = g * opened.detach() if ctx.needs_input_grad[1] else None
        # The activation's own backward, by autograd: it may be any function, and none is written out here.
        g_gate = torch.autograd.grad(opened, leaf, g * up)[0] if ctx.needs_input_grad[0] else None
        return g_gate, g_up, None


def _opened(node: Any, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The gate as a leaf, and its activation."""
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        return leaf, node.activation(leaf)


def _again(node: Any) -> Tensor:
    """The product; the activation is kept from the first reader that asks until the node's own backward."""
    gate, up = node.saved_tensors
    node.opened = node.opened or _opened(node, gate)
    return node.opened[1].detach() * up
