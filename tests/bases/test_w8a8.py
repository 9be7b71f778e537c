"""Weights and inputs in 8 bits: the product by its definition, gradients, every method, what is stored and merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimtune
from kinds import NEEDED, Host, Kind, methods_for
from slimtune.bases import base_of
from slimtune.bases.int8 import LinearW8A8, positive_rows
from slimtune.core.config import methods
from slimtune.ops import int8_kernel
from slimtune.slim.quantize import QuantizeConfig, quantize_
from small_text_model import save_base, tiny_model
from tensors import assert_near, randomize

IN, OUT = 64, 64


class RoundingLinear(nn.Linear):
    """What a W8A8 layer computes, as a plain one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(int8_kernel.on_token_grid(x), self.weight, self.bias)


def pair(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A W8A8 layer, and the plain one of the same weight."""
    torch.manual_seed(0)
    module = nn.Linear(IN, OUT, bias, dtype=dtype).requires_grad_(False)
    plain = RoundingLinear(IN, OUT, bias, dtype=dtype).requires_grad_(False)
    plain.load_state_dict(module.state_dict())
    LinearW8A8.take(module, *positive_rows(module.weight))
    plain.weight.data.copy_(base_of(module).weight(module))
    return module, plain


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


KIND = Kind("w8a8", lambda: pair()[0], lambda: inputs(2, 3, IN), OUT)


def test_a_token_is_rounded_to_its_own_grid() -> None:
    x = inputs(5, IN) * torch.tensor([1e-6, 1.0, 30.0, 0.0, 1e6])[:, None]
    rounded = int8_kernel.on_token_grid(x)
    step = x.abs().amax(-1, keepdim=True) / 127.5
    assert ((rounded - x).abs() <= step * 0.5001).all()
    assert (rounded[3] == 0).all()
    codes = rounded / torch.where(step == 0, 1.0, step)
    assert torch.allclose(codes, codes.round(), atol=1e-3)


@pytest.mark.parametrize("as_int8", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("tokens", [1, 16, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_that_of_rounded_inputs(
    tokens: int, dtype: torch.dtype, bound: float, bias: bool, as_int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_kernel, "_cpu_multiplies_int8", lambda: as_int8)
    module, plain = pair(bias, dtype)
    x = inputs(tokens, IN).to(dtype)
    with torch.no_grad():
        y = module(x)
    assert y.dtype == dtype
    # In float32, where the codes and their scales are exact.
    expected = plain.float()(x.float())
    assert_near(y.float(), expected, bound)


def test_a_gradient_passes_the_rounding_and_a_bias_learns() -> None:
    module, plain = pair()
    for layer in (module, plain):
        layer.bias.requires_grad_(True)
    gradients = []
    for layer in (module, plain):
        x = inputs(4, IN).requires_grad_(True)
        layer(x).square().sum().backward()
        gradients.append((x.grad, layer.bias.grad))
    for own, expected in zip(*gradients, strict=True):
        assert_near(own, expected, 1e-5)


# Rows of tokens attach to no layer with a forward of its own, as the plain one here has.
@pytest.mark.parametrize("method", sorted({*methods_for(KIND)} - {"TRAINABLE_TOKENS"}))
def test_every_method_trains_on_it_as_on_the_plain_layer_that_rounds(method: str) -> None:
    config: Any = methods()[method](target_modules=["site"], **NEEDED.get(method, {}))
    gradients = []
    for layer in pair():
        torch.manual_seed(0)
        model = randomize(slimtune, slimtune.get_peft_model(Host(layer), copy.deepcopy(config)))
        model.train()(KIND.input()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    own, expected = gradients
    assert len(own) == len(expected) > 0
    for one, other in zip(own, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_near(one, other, 1e-3)


def test_most_methods_attach() -> None:
    on_plain = Kind("linear", lambda: nn.Linear(IN, OUT), lambda: inputs(2, 3, IN), OUT)
    # What trains weights themselves finds none of these in floating point.
    assert set(methods_for(on_plain)) - set(methods_for(KIND)) <= {"FULL"}
    assert "LORA" in methods_for(KIND)


def test_a_model_is_stored_read_tuned_and_merged_either_way(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    model, _ = slimtune.load(tmp_path / "base", dtype="float32")
    quantize_(model, QuantizeConfig("W8A8"))
    ids = {"input_ids": torch.arange(3, 60)[None]}
    before = model(**ids).logits
    model.save_pretrained(tmp_path / "w8a8")
    again, _ = slimtune.load(tmp_path / "w8a8")
    assert sum(isinstance(module, LinearW8A8) for module in again.modules()) == 14
    assert torch.equal(again(**ids).logits, before)
    tuned = randomize(slimtune, slimtune.get_peft_model(again, slimtune.LoraConfig(r=4, task_type="CAUSAL_LM"))).eval()
    answers = tuned(**ids).logits
    merged = copy.deepcopy(tuned).merge_and_unload(requantize=True)
    assert sum(isinstance(module, LinearW8A8) for module in merged.modules()) == 14
    assert_near(merged(**ids).logits, answers, 0.1)
    plain = tuned.merge_and_unload()
    assert not any(isinstance(module, LinearW8A8) for module in plain.modules())
    assert_near(plain(**ids).logits, answers, 0.1)


def test_whole_tensors_have_one_scale() -> None:
    model = quantize_(tiny_model(), QuantizeConfig("W8A8", strategy="tensor"))
    for module in model.modules():
        if isinstance(module, LinearW8A8):
            assert (module.weight_scale == module.weight_scale[0]).all()
