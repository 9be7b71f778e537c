"""torch.func differentiates a model with adapters as autograd does, and each sample by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import slimtune
from tensors import assert_all_near, copies, randomize, trainable
from zoo import LLAMA

LINEAR = ["q_proj", "down_proj"]
CONFIGS = {
    "lora": slimtune.LoraConfig(r=2, target_modules=LINEAR),
    "dora": slimtune.LoraConfig(r=2, target_modules=LINEAR, use_dora=True),
    "vera": slimtune.VeraConfig(r=4, target_modules=LINEAR),
    "loha": slimtune.LoHaConfig(r=2, target_modules=LINEAR),
    "lokr": slimtune.LoKrConfig(r=2, target_modules=LINEAR),
    "ia3": slimtune.IA3Config(),
    "bitfit": slimtune.BitFitConfig(add_bias=True),
    "ln-tuning": slimtune.LNTuningConfig(),
    "bottleneck": slimtune.BottleneckConfig(),
    "prompt": slimtune.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradients_are_those_of_autograd(name: str) -> None:
    model: Any = slimtune.get_peft_model(LLAMA.model().double(), copy.deepcopy(CONFIGS[name]))
    randomize(slimtune, model).train()
    batch = LLAMA.batch()
    parameters = {key: value.detach() for key, value in trainable(model).items()}

    def loss(tensors: Any) -> torch.Tensor:
        return functional_call(model, tensors, (), batch).loss

    found = grad(loss)(parameters)
    model(**batch).loss.backward()
    expected: Any = {key: value.grad for key, value in trainable(model).items()}
    assert_all_near(copies(found), expected, 1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_each_sample_by_itself(dora: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    config = slimtune.LoraConfig(r=2, target_modules=["0", "2"], use_dora=dora)
    randomize(slimtune, slimtune.get_peft_model(model, config)).train()
    parameters = {key: value.detach() for key, value in trainable(model).items()}
    x = torch.randn(5, 6)

    def loss(tensors: Any, one: torch.Tensor) -> torch.Tensor:
        return functional_call(model, tensors, (one[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    model(x).square().sum().backward()
    expected: Any = {key: value.grad for key, value in trainable(model).items()}
    assert_all_near({key: value.sum(0) for key, value in each.items()}, expected, 1e-5)
