"""Attention over short texts in 16 bits on a processor, whose gradient is computed in float32.

torch's kernel for processors takes its gradient in small products, one for each block of a head, and in 16 bits these
cost more to begin than to compute: of 8 texts of 54 tokens behind 25 others they take twice as long as in float32, the
way there and back included. From some 350 keys on they are large enough.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from slimtune.ops.autograd import is_traced

LONGEST = 320
"""Keys up to which the gradient is computed in float32."""

_ATTENTION = "sdpa"
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_within = 0
_own: Any = None
"""transformers' function, while another one stands in its place."""
_changes = threading.Lock()


@contextmanager
def short_attention() -> Iterator[None]:
    """Within it, models of transformers that attend by "sdpa" take the gradient of short attention in float32.

    That is for 16 bits on a processor, up to 320 keys; the forward pass stays the same. `slimtune train` does it.
    It is entered around a training and not around a forward pass: checkpointing runs layers again in the backward pass.

    Example:
        >>> with slimtune.short_attention():
        ...     trainer.train()
    """
    global _within, _own
    with _changes:
        _within += 1
        if _within == 1:
            # Who was inside with a function of its own may have put ours back behind us.
            if _registered() is not _attend:
                _own = _registered()
            AttentionInterface.register(_ATTENTION, _attend)
    try:
        yield
    finally:
        with _changes:
            _within -= 1
            # What somebody else has put there meanwhile stays.
            if not _within and _registered() is _attend:
                AttentionInterface.register(_ATTENTION, _own)


def _registered() -> Any:
    """What all models find, whatever somebody has put before it in a registry of their own."""
    return AttentionInterface()[_ATTENTION]


def _attend(*args: Any, **kwargs: Any) -> Any:
    """transformers' function, with another gradient of the attention that it calls in the end."""
    if not _within or not torch.is_grad_enabled() or is_traced():
        return _own(*args, **kwargs)
    with _ShortAttention():
        return _own(*args, **kwargs)


class _ShortAttention(TorchFunctionMode):
    """Takes the place of `F.scaled_dot_product_attention` where `_is_short`."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _is_short(*args, **kwargs):
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _is_short(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> bool:  # fmt: skip
    """Whether torch would take its kernel for processors, in 16 bits and with a gradient, over few keys."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and not torch.is_autocast_enabled("cpu")
        and (query.requires_grad or key.requires_grad or value.requires_grad)
        and query.dim() == key.dim() == value.dim() == 4
        and 0 < key.shape[2] <= LONGEST
        and query.shape[2] > 0
        # As torch chooses its kernel, which reads rows of numbers that lie behind each other.
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[2] == value.shape[2]
        and query.shape[3] == key.shape[3] == value.shape[3]
        and (enable_gqa or query.shape[1] == key.shape[1])
        and key.shape[1] == value.shape[1]
        and not dropout_p
        and (attn_mask is None or (attn_mask.dim() in (2, 4) and not attn_mask.requires_grad))
        and not (is_causal and attn_mask is not None)
    )


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """As `F.scaled_dot_product_attention`: (B, H, L, D), of keys and values (B, G, S, D)."""
    if attn_mask is not None:
        # A summand, as torch makes it of a mask: minus infinity where a key isn't seen.
        summand, is_seen = torch.zeros_like(attn_mask, dtype=query.dtype), attn_mask.dtype == torch.bool
        attn_mask = summand.masked_fill_(~attn_mask, -torch.inf) if is_seen else summand + attn_mask
    return _Attention.apply(query, key, value, attn_mask, is_causal, scale)  # pyright: ignore[reportReturnType]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> Tensor:
        k, v = (_for_each_head(x, query.shape[1]) for x in (key, value))
        output, log_sums = _forward(query, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
        # Keys and values as they came: those that heads share are kept once.
        ctx.save_for_backward(query, key, value, output, log_sums, mask)
        ctx.is_causal, ctx.scale = is_causal, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, output, log_sums, mask = ctx.saved_tensors
        k, v = (_for_each_head(x.float(), query.shape[1]) for x in (key, value))
        of_query, *of_pairs = _backward(
            gradients[0].float(), query.float(), k, v, output.float(), log_sums, 0.0, ctx.is_causal,
            attn_mask=None if mask is None else mask.float(), scale=ctx.scale,
        )  # fmt: skip
        # (B, H, S, D) to (B, G, S, D): those of the heads that share a key sum up.
        sums = (x.unflatten(1, (key.shape[1], -1)).sum(2) if x.shape[1] > key.shape[1] else x for x in of_pairs)
        return of_query.to(query.dtype), *(x.to(query.dtype) for x in sums), None, None, None


def _for_each_head(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
