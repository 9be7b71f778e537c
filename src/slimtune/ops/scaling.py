"""A matrix times one number for each column or row, and the gradient of those numbers, each in one pass.

On a CPU torch multiplies two dtypes through copies, many times slower than one. A batch norm at rest computes this very
product, c * M + s with 16-bit M and float32 c, and its backward the sum, both in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtune.ops.autograd import PLAIN_TENSORS, is_traced, made_again, maker_of

_norm_backward = torch.ops.aten.native_batch_norm_backward.default


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor in the dtype of x, over its last dimension or, with more dimensions, over those.

    In 16 bits the input is kept for backward as it came, or not at all where a factor of one dimension meets an input
    that can be made again.
    """
    # In 32 bits torch's own product takes one pass too, and making the input again would take longer than it saves.
    has_node = factor.ndim == 1 and x.dtype.itemsize < 4 and type(x) in PLAIN_TENSORS
    if not has_node or is_traced():
        # One product of mixed dtypes: a 16-bit activation is kept for backward as it is, not as a float32 copy.
        return (x * factor).to(x.dtype)
    y_TD: Any = _Scaled.apply(x.reshape(-1, x.shape[-1]), factor, maker_of(x))
    # Not inside: what a custom function returns as a view can't be changed in place.
    return y_TD.view(x.shape)


def scale_columns(m_TO: Tensor, factor_O: Tensor, shift_O: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """m_TO * factor_O + shift_O in the dtype of m, rounded once.

    Args:
        out: where to write it; may be m itself.
    """
    out = torch.empty_like(m_TO) if out is None else out
    if factor_O.dtype != m_TO.dtype and _suits(m_TO) and _suits(out):
        # 1024 x 1536 in bfloat16 on one thread: 0.4 ms by the batch norm, 3.3 ms by torch's product of two dtypes (ADR
        # 6).
        _norm(_columns(m_TO), factor_O, shift_O, _columns(out))
        return out
    if shift_O is None:
        return torch.mul(m_TO, factor_O, out=out)
    return torch.addcmul(shift_O, m_TO, factor_O, out=out)


def scale_rows(m_OI: Tensor, factor_O: Tensor, out: Tensor | None = None) -> Tensor:
    """m_OI * factor_O1 in the dtype of m, rounded once; `out` as in `scale_columns`."""
    out = torch.empty_like(m_OI) if out is None else out
    if factor_O.dtype != m_OI.dtype and _suits(m_OI) and _suits(out):
        # As (1, out, in): `out` channels of `in` pixels each, one factor a channel.
        _norm(m_OI.unsqueeze(0), factor_O, None, out.unsqueeze(0))
        return out
    return torch.mul(m_OI, factor_O[:, None], out=out)


def column_dots(g_TO: Tensor, m_TO: Tensor) -> Tensor:
    """sum_T g_TO * m_TO, in float32 at least: the gradient of the factor in `scale_columns`."""
    if not (_suits(g_TO) and _suits(m_TO)):
        return (g_TO * m_TO).sum(0, dtype=_inside(m_TO))
    # The gradient of a norm's factor is sum g * (m - mean) / deviation, here with mean 0 and deviation 1. In float32
    # throughout, 0.34 ms; as a product and a sum, which round to bfloat16 between them, 0.88 ms (ADR 6).
    zero_O, one_O = _constants(m_TO.shape[1], _inside(m_TO))
    at_rest, wanted = (one_O, zero_O, one_O, None, None, False, 0.0), (False, True, False)
    return _norm_backward(_columns(g_TO), _columns(m_TO), *at_rest, wanted)[1]


def _suits(m: Tensor) -> bool:
    """Whether torch's batch norm takes this matrix in one pass."""
    return m.device.type == "cpu" and m.is_contiguous() and m.numel() > 0


def _inside(m: Tensor) -> torch.dtype:
    return torch.promote_types(m.dtype, torch.float32)


def _columns(m_TO: Tensor) -> Tensor:
    """As an image of T x 1 pixels with O channels, the channels last."""
    tokens, features = m_TO.shape
    # A row-major (T, O) matrix is channels-last as it lies: no copy.
    return m_TO.as_strided((1, features, tokens, 1), (m_TO.numel(), 1, features, 1))


def _constants(features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.zeros(features, dtype=dtype), torch.ones(features, dtype=dtype)


def _norm(image: Tensor, factor: Tensor, shift: Tensor | None, out: Tensor) -> None:
    factor = factor.to(_inside(image))
    shift = None if shift is None else shift.to(factor.dtype)
    unused = factor.new_empty(0)
    # Mean 0, variance 1, not training, no momentum, eps 0: (m - 0) / sqrt(1 + 0) * factor + shift.
    at_rest = *_constants(len(factor), factor.dtype), False, 0.0, 0.0
    torch.native_batch_norm(image, factor, shift, *at_rest, out=(out, unused, unused))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, factor_D: Tensor, maker: Any) -> Tensor:
        ctx.save_for_backward(None if maker else x_TD, factor_D)
        ctx.maker = maker
        return scale_columns(x_TD, factor_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *received: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g_TD,) = received
        x_TD, factor_D = ctx.saved_tensors
        gx_TD = gfactor_D = None
        if ctx.needs_input_grad[1]:
            x_TD = made_again(ctx.maker).reshape(g_TD.shape) if x_TD is None else x_TD
            gfactor_D = column_dots(g_TD, x_TD).to(factor_D.dtype)
        if ctx.needs_input_grad[0]:
            gx_TD = scale_columns(g_TD, factor_D)
        return gx_TD, gfactor_D, None
