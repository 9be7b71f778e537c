"""A fresh adapter is drawn from the distribution that peft draws from."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import slimtune
from tensors import adapter_tensors

FEATURES_IN, FEATURES_OUT, RANK = 400, 300, 64
KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(FEATURES_IN, FEATURES_OUT),
    "embedding": lambda: nn.Embedding(FEATURES_IN, FEATURES_OUT),
    "conv2d": lambda: nn.Conv2d(FEATURES_IN // 4, FEATURES_OUT, kernel_size=2),
}


def fresh(library: ModuleType, kind: str, init: Any) -> dict[str, Tensor]:
    """A and B of a fresh adapter, by their last letter."""
    model = nn.ModuleDict({"site": KINDS[kind]()})
    config = library.LoraConfig(r=RANK, target_modules=["site"], init_lora_weights=init)
    tensors = adapter_tensors(library, library.get_peft_model(model, config))
    return {"A" if "_A" in key else "B": tensor.detach() for key, tensor in tensors.items()}


def moments(tensor: Tensor) -> tuple[float, float, float]:
    """Mean, spread, and the greatest value in spreads: enough to tell zero, uniform and normal apart."""
    spread = float(tensor.std())
    return float(tensor.mean()), spread, float(tensor.abs().max()) / max(spread, 1e-12)


@pytest.mark.parametrize("init", [True, False, "gaussian", "Gaussian"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_moments_agree(kind: str, init: Any) -> None:
    ours, theirs = fresh(slimtune, kind, init), fresh(peft, kind, init)
    for name in "AB":
        mean, spread, peak = moments(ours[name])
        expected_mean, expected_spread, expected_peak = moments(theirs[name])
        # Some 19,000 to 26,000 draws: a spread is known to 1%, a mean to 1% of the spread.
        assert spread == pytest.approx(expected_spread, rel=0.03)
        assert mean == pytest.approx(expected_mean, abs=0.03 * max(expected_spread, 1e-12))
        assert (peak > 3) == (expected_peak > 3), "normal numbers exceed three spreads, uniform ones don't"


def test_the_default_is_uniform_in_a_and_zero_in_b() -> None:
    tensors = fresh(slimtune, "linear", True)
    bound = 1 / math.sqrt(FEATURES_IN)
    assert tensors["A"].abs().max() <= bound
    assert tensors["A"].abs().max() > 0.99 * bound
    assert not tensors["B"].any()


def test_two_adapters_are_drawn_apart() -> None:
    model = nn.ModuleDict({"site": nn.Linear(16, 16)})
    config = slimtune.LoraConfig(r=4, target_modules=["site"])
    model = slimtune.get_peft_model(model, config, adapter_name="one")
    model.add_adapter("two", config)
    one, two = (adapter_tensors(slimtune, model, name) for name in ("one", "two"))
    key = next(key for key in one if "lora_A" in key)
    assert not torch.equal(one[key], two[key])


def test_a_seed_makes_a_fresh_adapter_repeatable() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        model = nn.ModuleDict({"site": nn.Linear(16, 16)})
        config = slimtune.LoraConfig(r=4, target_modules=["site"], init_lora_weights=False)
        drawn.append(adapter_tensors(slimtune, slimtune.get_peft_model(model, config)))
    assert drawn[0].keys() == drawn[1].keys()
    assert all(torch.equal(drawn[0][key], drawn[1][key]) for key in drawn[0])
