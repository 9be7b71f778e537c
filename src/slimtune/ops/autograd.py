"""What a node of ours asks of autograd: who looks on, what is a plain tensor, and which outputs can be made again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

Product = Callable[[Tensor], Tensor]
"""x (..., in) to x W^T, (..., out), by a kernel that reads codes."""
PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)
"""What holds nothing but numbers, or stands for such a tensor where memory is planned."""


def is_traced() -> bool:
    """Whether a compiler or a transform of `torch.func` is at work: both take the plain formulas alone."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast switched off, where it is on."""
    # A node has cast its operands by then; autocast would cast float32 factors and their gradients a second time.
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()


def reads_codes(x: Tensor, dtype: torch.dtype, most_tokens: float) -> bool:
    """Whether a kernel may read codes for a product with x (..., in), rather than a weight that is expanded for it.

    There are few enough tokens, in bfloat16, and nothing is learned, traced or only planned.
    """
    tokens = x.numel() // max(1, x.shape[-1])
    return (
        0 < tokens <= most_tokens
        and dtype == torch.bfloat16
        and not torch.is_grad_enabled()
        and not is_traced()
        # No subclass: a tensor that is planned or sharded has no memory that a kernel could read.
        and type(x) is Tensor
    )


def maker_of(x: Tensor) -> Any:
    """The autograd node that can make this very tensor again in the backward pass, or None.

    It is one of ours that has a function `again`, the product of two tensors, as behind a gate, or a GELU.
    """
    node: Any = x.grad_fn
    # Under checkpointing what a node keeps can be asked for only once.
    if node is None or saving_is_hooked():
        return None
    # What these keep is there when a reader asks: their own backward, which lets go of it, comes after the reader's.
    if hasattr(node, "again") or node.name() == "GeluBackward0":
        return node
    # A product with a constant saves one of its two factors alone: both must need a gradient.
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
