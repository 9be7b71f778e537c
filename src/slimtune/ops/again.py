"""Tensors that are cheap to compute again: a node that reads one need not save it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
