"""Tensors that are cheap to compute again: a node that reads one need not save it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def maker_of(x: Tensor) -> Any:
    """The autograd node that can make this very tensor again in the backward pass, or None.

    It is one of ours that has a function `again`, or the product of two tensors, as behind a gate: such a node keeps
    what it needs for its own backward, which comes after that of the reader.
    """
    node: Any = x.grad_fn
    # Under checkpointing what a node keeps can be asked for only once.
    if node is None or saving_is_hooked():
        return None
    if hasattr(node, "again"):
        return node
    is_product = node.name() == "MulBackward0" and all(function for function, _ in node.next_functions)
    return node if is_product else None


def made_again(node: Any) -> Tensor:
    """The output of such a node."""
    again: Callable[[Any], Tensor] | None = getattr(node, "again", None)
    return node._saved_self * node._saved_other if again is None else again(node)


def saving_is_hooked() -> bool:
    """Whether something else than autograd keeps what is saved, as under gradient checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore[reportAttributeAccessIssue]
