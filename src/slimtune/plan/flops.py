"""Floating-point operations of a call, by torch's own table and what it lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """How many a call took, a multiplication and its addition counted as two; 0 for what multiplies no matrices."""
    count = _COUNTS.get(func.overloadpacket)
    return int(count(*args, **kwargs, out_val=result)) if count else 0


def _spread(one: Any, query: Any) -> Any:
    """The shape of keys or values, a head for each head of the queries: torch 2.11 counts no groups of heads."""
    return torch.Size((*one.shape[:1], *query.shape[1:2], *one.shape[2:]))


def _attention(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, _spread(key, query), _spread(value, query))


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, _spread(key, query), _spread(value, query))


_KERNELS = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
_COUNTS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
    **{getattr(_aten, f"_scaled_dot_product_{kernel}"): _attention for kernel in _KERNELS},
    **{getattr(_aten, f"_scaled_dot_product_{kernel}_backward"): _attention_backward for kernel in _KERNELS},
}
