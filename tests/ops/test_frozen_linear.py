"""The product with a frozen weight: on processors that emulate bfloat16 it is computed in float32, and rounds once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimtune.ops import frozen_linear as module
from slimtune.ops.frozen_linear import frozen_linear


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the gradients of x and of the bias for a gradient of y that is x W^T itself."""
    x, bias = x_TI.clone().requires_grad_(), bias_O.clone().requires_grad_()
    y = frozen_linear(x, weight_OI, bias, lambda: weight_OI, x.dtype)
    y.backward((x_TI @ weight_OI.t()).detach())
    assert x.grad is not None
    assert bias.grad is not None
    return y.detach(), x.grad, bias.grad


@pytest.mark.parametrize("tokens", [1, 4, 33])
@pytest.mark.parametrize("emulates", [True, False])
def test_an_emulated_product_is_the_exact_one_rounded(
    tokens: int, emulates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(module, "_emulates_bfloat16", lambda: emulates)
    x, weight, bias = torch.randn(tokens, 64), torch.randn(48, 64), torch.randn(48)
    rounded = [tensor.bfloat16() for tensor in (x, weight, bias)]
    y, gx, gbias = product(*rounded)
    assert y.dtype == gx.dtype == gbias.dtype == torch.bfloat16
    exact = product(*(tensor.double() for tensor in rounded))
    for mine, right in zip((y, gx, gbias), exact, strict=True):
        # bf16 has 8 bits; the gradients begin from a product that was rounded to them before.
        assert (mine.double() - right).norm() < 2**-7 * right.norm()
    if emulates and tokens >= 4:
        assert torch.equal(y, torch.nn.functional.linear(*(tensor.float() for tensor in rounded)).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_dtypes_are_multiplied_as_they_are(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_emulates_bfloat16", lambda: True)
    assert module.multiplied_in(torch.ones(64, 2, dtype=dtype)) == dtype
