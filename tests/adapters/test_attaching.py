"""Attaching changes nothing until something is learned; detaching leaves what was there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn

import slimtune
from kinds import KINDS, QUANTIZED, Kind, attach, cases, methods_for
from slimtune.core.config import PeftConfig, TargetedConfig, methods
from tensors import adapter_tensors, predict, randomize, trainable
from zoo import LLAMA, SPECIMENS, Specimen

each_specimen = pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
Case = tuple[Kind, PeftConfig]


def test_every_method_that_changes_modules_is_tested_on_some() -> None:
    on_modules = {name for name, config in methods().items() if issubclass(config, TargetedConfig)}
    assert on_modules == {name for kind in KINDS for name in methods_for(kind)}


@pytest.mark.parametrize("kind", QUANTIZED, ids=repr)
def test_every_method_for_linear_layers_is_for_quantized_ones_too(kind: Kind) -> None:
    in_floats = "linear" if kind.host().site.bias is not None else "linear-without-bias"
    (plain,) = (kind for kind in KINDS if kind.name == in_floats)
    assert methods_for(kind) == methods_for(plain)


@given(cases())
def test_a_fresh_adapter_changes_no_bit(case: Case) -> None:
    kind, config = case
    x = kind.input()
    expected = kind.host()(x)
    assert torch.equal(attach(kind, config).eval()(x), expected)


@given(cases())
def test_a_fresh_adapter_changes_no_bit_in_training(case: Case) -> None:
    kind, config = case
    x = kind.input()
    expected = kind.host().train()(x)
    assert torch.equal(attach(kind, config).train()(x), expected)


@given(cases(lora_dropout=0.0))
def test_a_moved_adapter_changes_the_output(case: Case) -> None:
    kind, config = case
    model = attach(kind, config)
    before = model(kind.input()).detach().clone()
    randomize(slimtune, model)
    # A fresh one changes no bit, so that no change is rounding.
    assert not torch.equal(model(kind.input()), before)


@given(cases())
def test_parameters_of_the_base_keep_their_names_and_are_frozen(case: Case) -> None:
    kind, config = case
    before = dict(kind.host().named_parameters())
    model = attach(kind, config)
    after = dict(model.named_parameters())
    assert set(before) <= set(after)
    assert not any(after[name].requires_grad for name in before)
    added = set(after) - set(before)
    assert added == set(trainable(model))
    assert all(name.startswith("site.deltas.default.") for name in added)


@given(cases())
def test_each_part_of_a_moved_adapter_gets_a_gradient_and_nothing_else_does(case: Case) -> None:
    kind, config = case
    model = randomize(slimtune, attach(kind, config)).train()
    model(kind.input()).square().sum().backward()
    without = [name for name, p in trainable(model).items() if p.grad is None or not p.grad.any()]
    assert without == []
    assert [name for name, p in model.named_parameters() if p.grad is not None and ".deltas." not in name] == []


@given(cases())
def test_detaching_restores_the_class_and_the_very_same_tensors(case: Case) -> None:
    kind, config = case
    host = kind.host()
    classes = [type(module) for module in host.modules()]
    tensors = dict(host.named_parameters())
    attributes = {name: set(module.__dict__) for name, module in host.named_modules()}
    expected = host(kind.input())
    model = randomize(slimtune, slimtune.get_peft_model(host, config))
    released = model.unload()
    assert released is host
    assert [type(module) for module in released.modules()] == classes
    assert {name: id(p) for name, p in released.named_parameters()} == {name: id(p) for name, p in tensors.items()}
    assert {name: set(module.__dict__) for name, module in released.named_modules()} == attributes
    assert torch.equal(released(kind.input()), expected)


@given(cases())
def test_disabled_equals_the_base_to_the_bit(case: Case) -> None:
    kind, config = case
    x = kind.input()
    expected = kind.host()(x)
    model = randomize(slimtune, attach(kind, config)).eval()
    tuned = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), tuned)
    model.disable_adapter_layers()
    assert torch.equal(model(x), expected)
    model.enable_adapter_layers()
    assert torch.equal(model(x), tuned)


@each_specimen
def test_whole_models_stay_what_they_are(specimen: Specimen) -> None:
    plain = specimen.model()
    names = {name: id(parameter) for name, parameter in plain.named_parameters()}
    expected = predict(plain, specimen.batch())
    cls = type(plain)
    model = slimtune.get_peft_model(plain, slimtune.LoraConfig(r=4, **specimen.options())).eval()
    assert model is plain
    assert isinstance(model, cls)
    assert isinstance(model, slimtune.PeftModel)
    kept = {name: id(p) for name, p in model.named_parameters() if ".deltas." not in name}
    assert kept == names
    assert torch.equal(predict(model, specimen.batch()), expected)
    assert model.get_base_model() is model
    released = model.unload()
    assert type(released) is cls
    assert {name: id(p) for name, p in released.named_parameters()} == names
    assert torch.equal(predict(released, specimen.batch()), expected)


@each_specimen
def test_disabled_models_equal_the_base_to_the_bit(specimen: Specimen) -> None:
    expected = predict(specimen.model(), specimen.batch())
    model = slimtune.get_peft_model(specimen.model(), slimtune.LoraConfig(r=4, **specimen.options())).eval()
    randomize(slimtune, model)
    with model.disable_adapter():
        assert torch.equal(predict(model, specimen.batch()), expected)
    assert not torch.equal(predict(model, specimen.batch()), expected)


class Twice(nn.Module):
    """One module under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("targets", [["first"], ["second"], ["first", "second"], "all-linear"])
def test_a_module_in_two_places_has_one_delta(targets: list[str] | str) -> None:
    torch.manual_seed(0)
    model = slimtune.get_peft_model(Twice(), slimtune.LoraConfig(r=2, lora_alpha=3, target_modules=targets))
    randomize(slimtune, model)
    assert len(trainable(model)) == 2
    tensors = {"A" if "_A" in key else "B": tensor for key, tensor in adapter_tensors(slimtune, model).items()}
    weight = model.first.weight + 1.5 * tensors["B"] @ tensors["A"]
    x = torch.randn(4, 6)
    expected = torch.tanh(x @ weight.t() + model.first.bias) @ weight.t() + model.first.bias
    torch.testing.assert_close(model(x), expected)


def test_hooks_on_a_module_still_fire_once() -> None:
    model = LLAMA.model()
    calls: list[str] = []
    site = model.model.layers[0].self_attn.q_proj
    site.register_forward_pre_hook(lambda *_: calls.append("before"))
    site.register_forward_hook(lambda *_: calls.append("after"))
    slimtune.get_peft_model(model, slimtune.LoraConfig(**LLAMA.options()))
    model(**LLAMA.batch())
    assert calls == ["before", "after"]


def test_what_was_frozen_before_attaching_is_frozen_again_after_detaching() -> None:
    model = LLAMA.model()
    model.model.embed_tokens.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert len(set(before.values())) == 2
    released = slimtune.get_peft_model(model, slimtune.LoraConfig(**LLAMA.options())).unload()
    assert {name: p.requires_grad for name, p in released.named_parameters()} == before


def test_an_adapter_that_is_added_is_not_trained_before_it_is_active() -> None:
    model: Any = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(r=2, **LLAMA.options()))
    before = set(trainable(model))
    model.add_adapter("other", slimtune.LoraConfig(r=2, **LLAMA.options()))
    assert set(trainable(model)) == before
    model.set_adapter("other")
    assert set(trainable(model)) == {name.replace(".default.", ".other.") for name in before}


def test_the_configs_of_all_adapters_can_be_set_at_once() -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(r=4, **LLAMA.options()))
    configs = {"default": copy.deepcopy(model.peft_config["default"])}
    model.peft_config = configs
    assert model.peft_config is configs
    assert model.active_peft_config is configs["default"]


@pytest.mark.parametrize("leave", ["unload", "merge_and_unload", "delete_adapter"])
def test_a_forward_that_was_put_on_a_module_stays_its_own(leave: str) -> None:
    """As accelerate puts one there; it is the base of the adapter, and back in its place afterwards."""
    model = LLAMA.model()
    site = model.model.layers[0].self_attn.q_proj
    calls: list[str] = []
    own = site.forward

    def instead(x: torch.Tensor) -> torch.Tensor:
        calls.append("instead")
        return 2 * own(x)

    site.forward = instead
    expected = predict(model, LLAMA.batch())
    tuned = slimtune.get_peft_model(model, slimtune.LoraConfig(**LLAMA.options()))
    assert torch.equal(predict(tuned, LLAMA.batch()), expected)
    of_the_probe = len(calls)
    tuned.delete_adapter("default") if leave == "delete_adapter" else getattr(tuned, leave)()
    # A merge is tried on the forward that was put there.
    del calls[of_the_probe:]
    assert torch.equal(predict(model, LLAMA.batch()), expected)
    assert calls == ["instead"] * 3
    if leave != "delete_adapter":
        assert vars(site)["forward"] is instead
        assert "instance_forward" not in vars(site)
        assert type(site) is nn.Linear


AROUND: dict[str, Any] = {
    "a-prompt": slimtune.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "the-head-adapted": slimtune.LoraConfig(r=2, target_modules=["lm_head"]),
    "the-head-whole": slimtune.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "layers": slimtune.LoraConfig(r=2, target_modules=["q_proj"]),
}


def looks_like_trl_s(hidden: Any, fused_lm_head: bool = False) -> Any:
    """TRL's forward is known by its argument."""
    return hidden


def an_own_forward(*args: Any, **kwargs: Any) -> Any:
    return "own"


@pytest.mark.parametrize("config", AROUND)
@pytest.mark.parametrize(("name", "value"), [("forward", an_own_forward), ("loss", looks_like_trl_s), ("notes", 3)])
def test_what_is_set_on_a_model_is_what_is_there(config: str, name: str, value: Any) -> None:
    """Adapters around the model, or on its head, have a part in TRL's forward alone."""
    model = slimtune.get_peft_model(LLAMA.model(), AROUND[config])
    setattr(model, name, value)
    assert getattr(model, name) is value
    if name == "forward":
        assert model(**LLAMA.batch()) == "own"
