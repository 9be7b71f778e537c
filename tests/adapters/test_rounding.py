"""The ways of rounding a merge that `benchmarks.rounding` compares: each does what it is named for."""

from __future__ import annotations

import pytest
import torch
from benchmarks.rounding import WAYS, by_inputs, carried, nearest, stochastic


@pytest.fixture
def weight_and_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (O, I) and inputs (N, I) that have something to do with each other."""
    draws = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(24, 160, generator=draws) * 0.05
    inputs_NI = torch.randn(400, 160, generator=draws) @ torch.randn(160, 160, generator=draws)
    return weight_OI, inputs_NI


@pytest.mark.parametrize("name", WAYS)
def test_what_comes_out_is_bf16_and_near(name: str, weight_and_inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight_OI, inputs_NI = weight_and_inputs
    rounded_OI = WAYS[name](weight_OI, inputs_NI.T @ inputs_NI)
    assert torch.equal(rounded_OI, rounded_OI.bfloat16().float())
    assert (rounded_OI - weight_OI).norm() < 2**-6 * weight_OI.norm()


def test_a_carried_error_keeps_the_sums_of_rows(weight_and_inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight_OI, _ = weight_and_inputs
    off = (carried(weight_OI, weight_OI).sum(1) - weight_OI.sum(1)).abs().mean()
    assert off < 0.2 * (nearest(weight_OI, weight_OI).sum(1) - weight_OI.sum(1)).abs().mean()


def test_chance_is_right_on_average() -> None:
    torch.manual_seed(0)
    # A quarter of the way from 1 to the next bf16, 2**-7 above it; and below zero.
    for value in (1 + 2**-9, -1 - 2**-9):
        drawn = stochastic(torch.full((200, 200), value), torch.empty(0))
        assert set(drawn.unique().tolist()) == {value / abs(value), value / abs(value) * (1 + 2**-7)}
        assert abs(drawn.mean().item() - value) < 1e-4


def test_products_are_nearest_by_the_inputs(weight_and_inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight_OI, inputs_NI = weight_and_inputs
    gram_II = inputs_NI.T @ inputs_NI
    lost = {way: (inputs_NI @ (weight_OI - way(weight_OI, gram_II)).T).norm() for way in (nearest, by_inputs)}
    assert lost[by_inputs] < 0.8 * lost[nearest]
