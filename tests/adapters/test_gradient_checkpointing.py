"""Gradient checkpointing over a frozen base gives the very gradients that there are without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import slimtune
from tensors import adapter_gradients, adapter_tensors, assert_all_near, copies, loss_of, randomize
from zoo import BERT, GPT2, LLAMA, T5, TIED_LLAMA, VIT, Specimen

SPECIMENS = [LLAMA, TIED_LLAMA, GPT2, BERT, T5, VIT]


def gradients(specimen: Specimen, checkpointing: dict[str, Any] | None, **options: Any) -> dict[str, torch.Tensor]:
    config = slimtune.LoraConfig(r=4, **specimen.options(**options))
    model = randomize(slimtune, slimtune.get_peft_model(specimen.model(), config)).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        assert model.is_gradient_checkpointing
    torch.manual_seed(8)
    loss_of(model, specimen.batch()).backward()
    found = copies(adapter_gradients(slimtune, model))
    assert sorted(found) == sorted(adapter_tensors(slimtune, model))
    return found


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_gradients_are_the_same(specimen: Specimen, use_reentrant: bool) -> None:
    expected = gradients(specimen, None)
    assert_all_near(gradients(specimen, {"use_reentrant": use_reentrant}), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pixels_behind_which_only_the_blocks_are_adapted(use_reentrant: bool) -> None:
    targets = {"target_modules": ["q_proj", "v_proj"]}
    expected = gradients(VIT, None, **targets)
    assert_all_near(gradients(VIT, {"use_reentrant": use_reentrant}, **targets), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_dropout_draws_the_same_masks_again(use_reentrant: bool) -> None:
    """The recomputed forward must drop what the first one dropped, or the gradients belong to another function."""
    expected = gradients(LLAMA, None, lora_dropout=0.3)
    assert_all_near(gradients(LLAMA, {"use_reentrant": use_reentrant}, lora_dropout=0.3), expected, 1e-6)
    undropped = gradients(LLAMA, None)
    assert any(not torch.allclose(expected[key], undropped[key]) for key in expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_enabled_before_attaching(use_reentrant: bool) -> None:
    expected = gradients(LLAMA, None)
    model = LLAMA.model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model = randomize(slimtune, slimtune.get_peft_model(model, slimtune.LoraConfig(r=4, **LLAMA.options()))).train()
    loss_of(model, LLAMA.batch()).backward()
    assert_all_near(copies(adapter_gradients(slimtune, model)), expected, 1e-6)


def test_a_checkpointed_model_of_one_s_own() -> None:
    class Checkpointed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
            self.checkpointing = False

        def block(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.tanh(self.first(x)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.checkpointing:
                return self.block(x)
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)

    torch.manual_seed(0)
    config = slimtune.LoraConfig(r=2, target_modules=["first", "second"], lora_dropout=0.5)
    model = randomize(slimtune, slimtune.get_peft_model(Checkpointed(), config)).train()
    found = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(1)
        model(torch.randn(4, 6)).square().sum().backward()
        found.append(copies(adapter_gradients(slimtune, model)))
    assert_all_near(found[1], found[0], 1e-6)
