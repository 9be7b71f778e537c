"""In 16 bits an update far below a digit of the output still arrives, right in the mean (ADR 26)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtune

LEARNS: dict[str, tuple[Any, str]] = {
    "lora": (slimtune.LoraConfig(r=4, target_modules=["0"]), "lora_B"),
    "dora": (slimtune.LoraConfig(r=4, target_modules=["0"], use_dora=True), "lora_B"),
    "vera": (slimtune.VeraConfig(r=64, target_modules=["0"]), "vera_lambda_b"),
    "loha": (slimtune.LoHaConfig(r=4, target_modules=["0"]), "hada_w2_b"),
}
"""By method, its config and what is zero in it at the start."""
SHARE = 5e-4
"""Of the output: bf16 has digits of 4e-3 to 8e-3 of a number."""


def tuned(method: str, dtype: torch.dtype, size: float) -> Any:
    """A layer without a bias and an update of some size."""
    torch.manual_seed(0)
    config, name = LEARNS[method]
    host = nn.Sequential(nn.Linear(192, 256, bias=False).to(torch.bfloat16).to(dtype))
    model = slimtune.get_peft_model(host, config)
    for key, parameter in model.named_parameters():
        if name in key:
            nn.init.normal_(parameter, std=size)
    return model


def computed(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the gradient of the input."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("method", LEARNS)
def test_a_small_update_arrives(method: str) -> None:
    x = torch.randn(512, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
    straight, size = computed(tuned(method, torch.float32, 0.0), x.float()), 1e-3
    for _ in range(2):
        updated = computed(tuned(method, torch.float32, size), x.float())
        size *= SHARE * float(straight[0].norm() / (updated[0] - straight[0]).norm())
    updated = computed(tuned(method, torch.float32, size), x.float())
    for found, before, after in zip(computed(tuned(method, torch.bfloat16, size), x), straight, updated, strict=True):
        update = after - before
        assert 0 < update.norm() < 3 * SHARE * before.norm()
        arrived = float(((found.float() - before) * update).sum() / update.square().sum())
        assert 0.8 < arrived < 1.2
