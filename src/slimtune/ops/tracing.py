"""Whether somebody else than autograd looks at what is computed."""

from __future__ import annotations

import torch


def is_traced() -> bool:
    """Whether a compiler or a transform of `torch.func` is at work: both take the plain formulas alone."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]
