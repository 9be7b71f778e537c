"""torch's transformer encoders have a path that reads weights past the modules; an adapter must not be lost there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import slimtune
from slimtune.adapters.rows import RowAdapters
from tensors import assert_near, randomize


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


class Host(nn.Module):
    """A model of one's own around such an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()

    def forward(self, x: torch.Tensor, src_key_padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.encoder(x, src_key_padding_mask=src_key_padding_mask)


@pytest.mark.parametrize("build", [encoder, Host])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_an_adapter_counts_in_inference_too(build: Callable[[], nn.Module], masked: bool) -> None:
    host = build().eval()
    classes = [type(module) for module in host.modules()]
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None
    base = host(x, src_key_padding_mask=mask)
    config = slimtune.LoraConfig(r=2, target_modules=["linear1", "linear2"])
    model: Any = randomize(slimtune, slimtune.get_peft_model(host, config)).eval()
    seen = torch.ones(2, 5, dtype=torch.bool) if mask is None else ~mask
    expected = model.train()(x, src_key_padding_mask=mask)[seen]
    assert (expected - base[seen]).abs().max() > 1e-3
    assert_near(model.eval()(x, src_key_padding_mask=mask)[seen], expected)
    assert_near(copy.deepcopy(model)(x, src_key_padding_mask=mask)[seen], expected)
    with model.adapter_state.using(applied=(), rows=RowAdapters(("default", "default"))):
        assert_near(model(x, src_key_padding_mask=mask)[seen], expected)
    with model.disable_adapter():
        assert torch.equal(model(x, src_key_padding_mask=mask), base)
    assert_near(copy.deepcopy(model).merge_and_unload()(x, src_key_padding_mask=mask)[seen], expected)
    assert torch.equal(model.unload()(x, src_key_padding_mask=mask), base)
    assert [type(module) for module in model.modules()] == classes
