"""The edges of DoRA's fused product: factors of zero, outputs that are written over, sums of 16-bit squares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtune
from tensors import assert_near, randomize

TOKENS, WIDTH, HEIGHT = 24, 20, 12


def layer(dtype: torch.dtype = torch.float32, width: int = WIDTH, bias: bool = False) -> Any:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(width, HEIGHT, bias=bias)).to(dtype)


def tuned(base: Any) -> Any:
    config = slimtune.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["0"])
    return randomize(slimtune, slimtune.get_peft_model(base, config)).train()


def inputs(dtype: torch.dtype = torch.float32, width: int = WIDTH) -> Tensor:
    return torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(2)).to(dtype)


def magnitude_gradient(model: Any, x: Tensor, seen: Tensor) -> Tensor:
    """The gradient of m by its definition: g_t . (W + s B A) x_t / n, in float64."""
    delta = model[0].deltas["default"]
    a, b = (factor.detach().double() for factor in delta.pair)
    moved = model[0].weight.detach().double() + delta.scaling * b @ a
    return (seen.double() * (x.double() @ moved.t())).sum(0) / moved.norm(dim=1)


@pytest.mark.parametrize("rows", [[0], [3, 7], range(HEIGHT)])
def test_a_magnitude_of_zero_gets_its_gradient(rows: Any) -> None:
    model, x = tuned(layer()), inputs()
    magnitude = model[0].deltas["default"].lora_magnitude_vector
    with torch.no_grad():
        magnitude[list(rows)] = 0.0
    y = model(x)
    assert y[:, list(rows)].abs().max() < 1e-10
    seen = torch.linspace(-1, 1, y.numel()).view_as(y)
    y.backward(seen)
    assert_near(magnitude.grad, magnitude_gradient(model, x, seen), 1e-4)


@pytest.mark.parametrize("change", ["mul_", "add_", "copy_"])
def test_an_output_that_is_written_over_in_place_gives_the_gradient_of_what_it_was(change: str) -> None:
    """Linear changes: autograd keeps nothing of the output for them, and can't notice."""
    model, x = tuned(layer()), inputs()
    magnitude = model[0].deltas["default"].lora_magnitude_vector
    y = model(x)
    seen = torch.linspace(-1, 1, y.numel()).view_as(y)
    loss = (y.clone() * seen).sum()
    with torch.no_grad():
        y.detach().mul_(3.0) if change == "mul_" else y.detach().add_(1.0) if change == "add_" else y.detach().zero_()
    loss.backward()
    assert_near(magnitude.grad, magnitude_gradient(model, x, seen), 1e-4)


def test_squares_of_16_bit_weights_are_summed_in_float32() -> None:
    base = layer(torch.bfloat16, width=3000)
    exact = base[0].weight.detach().double().norm(dim=1)
    config = slimtune.LoraConfig(r=3, use_dora=True, target_modules=["0"])
    model = slimtune.get_peft_model(base, config)
    delta = model[0].deltas["default"]
    assert_near(delta.lora_magnitude_vector, exact, 1e-6)  # in bfloat16 2e-3
    # and so at each step: c is one until something is learned
    x = inputs(torch.bfloat16, 3000)
    for training in (True, False):
        assert torch.equal(model.train(training)(x), nn.functional.linear(x, base[0].weight))


def test_a_norm_that_cancels_is_zero_and_not_the_root_of_less() -> None:
    """W + s B A = 0: the three terms of n^2 are as large as ||W||^2 and leave their rounding."""
    for seed in range(8):
        torch.manual_seed(seed)
        base = nn.Sequential(nn.Linear(64, 40, bias=False))
        a, b = torch.randn(2, 64), torch.randn(40, 2)
        with torch.no_grad():
            base[0].weight.copy_(-(b @ a))
        config = slimtune.LoraConfig(r=2, lora_alpha=2, use_dora=True, target_modules=["0"])
        model = slimtune.get_peft_model(base, config)
        delta = model[0].deltas["default"]
        with torch.no_grad():
            delta.lora_A.copy_(a)
            delta.lora_B.copy_(b)
        norms = delta.norms(base[0].weight, base[0].weight.detach().square().sum(1))
        assert norms.isfinite().all()
        assert norms.max() < 1e-2 * base[0].weight.norm(dim=1).max()
        for training in (True, False):
            assert model.train(training)(torch.randn(4, 64)).isfinite().all()
