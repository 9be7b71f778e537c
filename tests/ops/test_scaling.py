"""One number for each column or row: rounded once, in one pass, and no copy kept of what can be made again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slimtune.ops.scaling import column_dots, scale_columns, scale_rows, scaled

DTYPES = [
    (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32),
    (torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float64, torch.float32),
]  # fmt: skip
SHAPES = [(5, 3), (1, 7), (7, 1), (1, 1), (0, 4), (700, 33)]
each_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def drawn(shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix, a factor for each column, and both's product before it is rounded."""
    torch.manual_seed(0)
    m, factor = torch.randn(shape).to(dtypes[0]), (1 + torch.randn(shape[1]) / 4).to(dtypes[1])
    wide = torch.promote_types(torch.promote_types(*dtypes), torch.float32)
    return m, factor, m.to(wide) * factor.to(wide)


@each_shape
@each_dtype
def test_products_are_rounded_once(dtypes: Any, shape: tuple[int, int]) -> None:
    m, factor, product = drawn(shape, dtypes)
    expected = product.to(m.dtype)
    assert torch.equal(scale_columns(m, factor), expected)
    assert torch.equal(scale_rows(m.t().contiguous(), factor), expected.t())
    assert torch.equal(scale_columns(m.t().contiguous().t(), factor), expected)
    in_place = m.clone()
    assert scale_columns(in_place, factor, out=in_place) is in_place
    assert torch.equal(in_place, expected)


@each_dtype
def test_a_shift_is_added_before_rounding(dtypes: Any) -> None:
    m, factor, product = drawn((40, 6), dtypes)
    shift = torch.randn(6).to(dtypes[1])
    half_a_step = torch.finfo(m.dtype).eps / 2
    expected = (product.double() + shift.double()).to(m.dtype)
    for laid_out in (m, m.t().contiguous().t()):
        found = scale_columns(laid_out, factor, shift)
        torch.testing.assert_close(found.double(), expected.double(), rtol=2 * half_a_step, atol=half_a_step)
    assert torch.equal(scale_columns(m, torch.ones_like(factor), torch.zeros_like(shift)), m)


@each_shape
@each_dtype
def test_dots_are_summed_in_float32_at_least(dtypes: Any, shape: tuple[int, int]) -> None:
    m, _, _ = drawn(shape, dtypes)
    for g in (torch.randn(shape).to(m.dtype), torch.ones(1, 1).to(m.dtype).expand(shape)):
        dots = column_dots(g, m)
        assert dots.dtype == torch.promote_types(m.dtype, torch.float32)
        torch.testing.assert_close(dots.double(), (g.double() * m.double()).sum(0), rtol=1e-5, atol=1e-4)


def gradients(y: Tensor, g: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [gradient.double() for gradient in torch.autograd.grad(y, leaves, g.to(y.dtype))]


@each_dtype
@torch.enable_grad()
def test_gradients_are_the_formula_s(dtypes: Any) -> None:
    m, factor, _ = drawn((700, 33), dtypes)
    g = torch.randn(7, 100, 33).to(m.dtype)
    x, vector = m.view(7, 100, 33).clone().requires_grad_(), factor.requires_grad_()
    wide_x, wide_vector = x.detach().double().requires_grad_(), factor.detach().double().requires_grad_()
    ours = gradients(scaled(x, vector), g, x, vector)
    expected = gradients(wide_x * wide_vector, g, wide_x, wide_vector)
    for dtype, one, other in zip(dtypes, ours, expected, strict=True):
        step = max(torch.finfo(dtype).eps, 2.0**-20)
        torch.testing.assert_close(one, other, rtol=step, atol=100 * 2.0**-20)


@torch.enable_grad()
def test_an_input_that_can_be_made_again_is_not_kept() -> None:
    x, vector = torch.randn(50, 8).bfloat16().requires_grad_(), torch.randn(8).requires_grad_()
    y = scaled(F.gelu(x), vector)
    node: Any = y.grad_fn
    saved = [tensor for tensor in node.next_functions[0][0].saved_tensors if tensor is not None]
    assert [tensor.shape for tensor in saved] == [vector.shape]
    g = torch.randn_like(y)
    kept = (F.gelu(x) * vector).to(x.dtype)
    for one, other in zip(gradients(y, g, x, vector), gradients(kept, g, x, vector), strict=True):
        torch.testing.assert_close(one, other, rtol=2.0**-8, atol=2.0**-8)
