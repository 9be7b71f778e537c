"""LoRA+: B learns faster than A, by parameter groups that are peft's."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

import slimtune
from slimtune.errors import ConfigError
from tensors import adapter_tensors, assert_all_near, copies, loss_of, randomize, trainable
from zoo import LLAMA, MIXTURE, Specimen

RATES: dict[str, Any] = {"lr": 1e-3, "loraplus_lr_ratio": 16.0}


def tuned(library: Any, specimen: Specimen, **options: Any) -> Any:
    config = library.LoraConfig(r=4, **specimen.options(**options))
    return randomize(library, library.get_peft_model(specimen.model(), config)).train()


def test_b_has_the_rate_of_a_times_the_ratio() -> None:
    model = tuned(slimtune, LLAMA)
    names = {id(parameter): name for name, parameter in trainable(model).items()}
    rates = {
        names[id(parameter)]: group["lr"]
        for group in slimtune.lora_plus_groups(model, **RATES)
        for parameter in group["params"]
    }
    assert sorted(rates) == sorted(names.values()), "each trainable parameter is in one group"
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-3}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {16e-3}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_two_steps_are_peft_s(bias: str) -> None:
    ends = []
    for library in (slimtune, peft):
        model = tuned(library, MIXTURE, bias=bias).to(torch.float64)
        if library is slimtune:
            groups = slimtune.lora_plus_groups(model, weight_decay=0.1, **RATES)
            optimizer = torch.optim.AdamW(groups)
        else:
            optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, loraplus_weight_decay=0.1, **RATES)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, MIXTURE.batch()).backward()
            optimizer.step()
        ends.append(copies(adapter_tensors(library, model)))
    assert_all_near(*ends, 1e-9)


def test_nothing_to_train_is_an_error() -> None:
    model = tuned(slimtune, LLAMA)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="trainable"):
        slimtune.lora_plus_groups(model, **RATES)
