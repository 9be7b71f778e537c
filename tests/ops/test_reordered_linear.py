"""Weights in oneDNN's blocks: the same numbers and the same products, for as long as an engine runs, and then gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import slimtune
from slimtune.adapters.adopt import reclass
from slimtune.bases import base_of
from slimtune.engine.weights import reordered_weights
from slimtune.ops.reordered_linear import LinearReordered, can_reorder, reordered
from tensors import assert_near, randomize
from zoo import LLAMA, TIED_LLAMA, token_ids

pytestmark = pytest.mark.skipif(not can_reorder(nn.Linear(3, 2)), reason="torch has no oneDNN here")

CONFIGS = {
    "lora": slimtune.LoraConfig(init_lora_weights=False),
    "dora": slimtune.LoraConfig(init_lora_weights=False, use_dora=True, target_modules="all-linear"),
    "ia3": slimtune.IA3Config(),
    "loha": slimtune.LoHaConfig(init_weights=False),
    "head": slimtune.LoraConfig(init_lora_weights=False, modules_to_save=["lm_head"]),
    "bitfit": slimtune.LoraConfig(init_lora_weights=False, bias="all", target_modules=["q_proj"]),
}


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (33, 257), (64, 48), (576, 192)])
def test_the_product_and_the_weight_are_as_before(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Linear(inputs, outputs, bias)
    own, numbers = layer.weight, layer.weight.detach().clone()
    xs = [torch.randn(*shape, inputs) for shape in ((1,), (16,), (2, 3), (1, 300))]
    before = [layer(x) for x in xs]
    with reordered([layer], reclass):
        assert type(layer) is LinearReordered
        assert own.numel() == 0, "the weight is there twice"
        assert base_of(layer).spec(layer) == (numbers.shape, numbers.dtype, numbers.device)
        assert torch.equal(base_of(layer).weight(layer), numbers)
        assert torch.equal(layer.state_dict()["weight"], numbers)
        for x, expected in zip(xs, before, strict=True):
            with torch.no_grad():
                assert_near(layer(x), expected)
            # Outside of inference the plain product is taken, which gradients pass.
            wanted = x.clone().requires_grad_()
            assert_near(layer(wanted), expected)
            layer(wanted).sum().backward()
            assert wanted.grad is not None
            assert_near(wanted.grad, numbers.sum(0).expand_as(x))
    assert type(layer) is nn.Linear
    assert layer.weight is own
    assert torch.equal(own, numbers)


@pytest.mark.parametrize("specimen", [LLAMA, TIED_LLAMA], ids=lambda specimen: specimen.name)
@pytest.mark.parametrize("is_adapted", [True, False])
def test_a_model_computes_the_same_and_is_the_same_afterwards(specimen: Any, is_adapted: bool) -> None:
    model: Any = specimen.model()
    for seed, (name, config) in enumerate(CONFIGS.items() if is_adapted else ()):
        slimtune.get_peft_model(model, config, name) if not seed else model.add_adapter(name, config)
        randomize(slimtune, model, name, seed)
    model.eval()
    ids = token_ids(2, 9)

    def logits() -> list[Any]:
        found = []
        for name in CONFIGS if is_adapted else [None]:
            if name:
                model.set_adapter(name)
            # In inference, as an engine is: what the model keeps of it is the owner's to train afterwards.
            with torch.inference_mode():
                found.append(model(input_ids=ids).logits)
        return found

    parameters, state = dict(model.named_parameters()), {k: v.clone() for k, v in model.state_dict().items()}
    classes = {name: type(module) for name, module in model.named_modules()}
    expected = logits()
    with torch.inference_mode(), reordered_weights(model):
        assert sum(isinstance(module, LinearReordered) for module in model.modules()) >= 14
        assert model.get_input_embeddings().weight.numel(), "the embedding reads its own rows"
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        for found, wanted in zip(logits(), expected, strict=True):
            assert_near(found, wanted, 1e-4)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_what_is_no_plain_layer_stays_as_it_is() -> None:
    hooked: Any = nn.Linear(4, 4)
    hooked.forward = lambda x: x
    assert not can_reorder(hooked)
    assert not can_reorder(OwnLinear(4, 4))
    assert not can_reorder(nn.Linear(4, 4, device="meta"))
    assert not can_reorder(nn.Linear(4, 4, dtype=torch.float64))
    assert not can_reorder(nn.Conv1d(4, 4, 1))
    assert can_reorder(nn.Linear(4, 4))


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = LLAMA.model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []

    def fails_at_the_fifth(module: Any, module_type: type[nn.Module]) -> None:
        seen.append(module)
        if len(seen) == 5:
            raise RuntimeError("out of memory")
        reclass(module, module_type)

    monkeypatch.setattr("slimtune.engine.weights.reclass", fails_at_the_fifth)
    with pytest.raises(RuntimeError, match="out of memory"), reordered_weights(model):
        pass
    assert not any(isinstance(module, LinearReordered) for module in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
