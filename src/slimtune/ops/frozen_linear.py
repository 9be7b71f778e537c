"""A product with a frozen weight that is expanded again for the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable


def frozen_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dequantizer: Callable[[], Tensor] | None, dtype: torch.dtype
) -> Tensor:
    """y = x W^T + b, computed in `dtype` or in that of autocast, given back in the dtype of x.

    Args:
        dequantizer: expands the weight once more for the backward pass; None where the weight is kept.
    """
    is_cast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if is_cast else dtype
    with no_autocast(x.device.type):
        x_TI, weight_OI = x.to(dtype), weight_OI.to(dtype)
        bias_O = None if bias_O is None else bias_O.to(dtype)
        if dequantizer is None or is_traced():
            y: Any = F.linear(x_TI, weight_OI, bias_O)
        else:
            y_TO: Any = _FrozenLinear.apply(x_TI.reshape(-1, x.shape[-1]), weight_OI, bias_O, dequantizer)
            # Not inside: what a custom function returns as a view can't be changed in place.
            y = y_TO.view(*x.shape[:-1], y_TO.shape[-1])
    return y if is_cast else y.to(x.dtype)


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast switched off, where it is on."""
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dequantizer: Callable[[], Tensor]
    ) -> Tensor:
        ctx.dequantizer = dequantizer
        return F.linear(x_TI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *received: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g_TO,) = received
        needs_x, _, needs_bias, _ = ctx.needs_input_grad
        with no_autocast(g_TO.device.type):
            gx_TI = g_TO @ ctx.dequantizer().to(g_TO.dtype) if needs_x else None
            gbias_O = g_TO.sum(0) if needs_bias else None
        return gx_TI, None, gbias_O, None


PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)
"""What holds nothing but numbers, or stands for such a tensor where memory is planned."""


def is_traced() -> bool:
    """Whether a compiler or a transform of `torch.func` is at work: both take the plain formulas alone."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]


def maker_of(x: Tensor) -> Any:
    """The autograd node that can make this very tensor again in the backward pass, or None.

    It is one of ours that has a function `again`, the product of two tensors, as behind a gate, or a GELU: such a node
    keeps what it needs for its own backward, which comes after that of the reader.
    """
    node: Any = x.grad_fn
    # Under checkpointing what a node keeps can be asked for only once.
    if node is None or saving_is_hooked():
        return None
    if hasattr(node, "again") or node.name() == "GeluBackward0":
        return node
    is_product = node.name() == "MulBackward0" and all(function for function, _ in node.next_functions)
    return node if is_product else None


def made_again(node: Any) -> Tensor:
    """The output of such a node."""
    if hasattr(node, "again"):
        return node.again(node)
    if node.name() == "GeluBackward0":
        return F.gelu(node._saved_self, approximate=node._saved_approximate)
    return node._saved_self * node._saved_other


def saving_is_hooked() -> bool:
    """Whether something else than autograd keeps what is saved, as under gradient checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore[reportAttributeAccessIssue]
