"""Any number of adapters, in any order of operations, add up to what each says alone and leave the base alone."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import slimtune
from tensors import adapter_tensors, assert_near, assert_same, copies, predict, randomize, trainable
from zoo import LLAMA, MIXTURE

NAMES = ("red", "green", "blue", "yellow")


class Adapters(RuleBasedStateMachine):
    """A linear layer with adapters, beside the matrices that it should amount to."""

    @initialize()
    def attach(self) -> None:
        torch.manual_seed(0)
        linear = nn.Linear(6, 5)
        self.weight, self.bias = linear.weight, linear.bias
        self.expected_weight = linear.weight.detach().clone()
        self.x = torch.randn(3, 6)
        self.updates: dict[str, torch.Tensor] = {}
        self.merged: tuple[str, ...] = ()
        self.enabled = True
        self.model: Any = nn.Sequential(linear)
        self.add("red", 2, 4)
        self.active = ["red"]

    def add(self, name: str, r: int, alpha: int) -> None:
        config = slimtune.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"])
        if self.updates:
            self.model.add_adapter(name, config)
        else:
            self.model = slimtune.get_peft_model(self.model, config, adapter_name=name)
        randomize(slimtune, self.model, name, seed=len(self.updates) + r)
        tensors = {key.split(".")[-2]: t for key, t in adapter_tensors(slimtune, self.model, name).items()}
        self.updates[name] = (alpha / r) * (tensors["lora_B"] @ tensors["lora_A"]).detach().clone()

    @precondition(lambda self: set(NAMES) - set(self.updates))
    @rule(data=st.data(), r=st.integers(1, 5), alpha=st.integers(1, 9))
    def add_adapter(self, data: st.DataObject, r: int, alpha: int) -> None:
        self.add(data.draw(st.sampled_from(sorted(set(NAMES) - set(self.updates)))), r, alpha)

    @rule(data=st.data())
    def set_adapter(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.updates)), min_size=1, unique=True))
        self.model.set_adapter(names if len(names) > 1 else names[0])
        self.active = names

    @precondition(lambda self: len(self.updates) > 1)
    @rule(data=st.data())
    def delete_adapter(self, data: st.DataObject) -> None:
        free = sorted(set(self.updates) - set(self.merged))
        if free:
            name = data.draw(st.sampled_from(free))
            self.model.delete_adapter(name)
            del self.updates[name]
            self.active = [other for other in self.active if other != name] or [next(iter(self.updates))]

    @precondition(lambda self: self.enabled)
    @rule(data=st.data())
    def merge(self, data: st.DataObject) -> None:
        names = data.draw(st.none() | st.lists(st.sampled_from(sorted(self.updates)), min_size=1, unique=True))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*merged already")
            self.model.merge_adapter(names)
        self.merged = (*self.merged, *(name for name in names or self.active if name not in self.merged))

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.merged = ()

    @precondition(lambda self: not self.merged)
    @rule(enabled=st.booleans())
    def enable(self, enabled: bool) -> None:
        (self.model.enable_adapter_layers if enabled else self.model.disable_adapter_layers)()
        self.enabled = enabled

    @rule()
    def copy(self) -> None:
        self.model = copy.deepcopy(self.model)
        self.weight, self.bias = (None, None)

    @rule()
    def copy_while_disabled(self) -> None:
        with self.model.disable_adapter():
            self.model = copy.deepcopy(self.model)
        self.weight, self.bias, self.merged = None, None, ()

    @precondition(lambda self: self.enabled)
    @rule(data=st.data())
    def unload_a_copy(self, data: st.DataObject) -> None:
        names = data.draw(st.none() | st.lists(st.sampled_from(sorted(self.updates)), min_size=1, unique=True))
        plain = copy.deepcopy(self.model).merge_and_unload(adapter_names=names)
        wanted = {*self.merged, *(names or self.active)}
        assert_near(plain[0].weight, self.expected_weight + sum(self.updates[name] for name in wanted), 1e-5)

    @precondition(lambda self: len(self.updates) > 1 and set(NAMES) - set(self.updates))
    @rule(data=st.data(), weight=st.floats(-2, 2))
    def combine(self, data: st.DataObject, weight: float) -> None:
        name = data.draw(st.sampled_from(sorted(set(NAMES) - set(self.updates))))
        first, second = sorted(self.updates)[:2]
        if sum(self.model.peft_config[n].r for n in (first, second)) <= 5:
            self.model.add_weighted_adapter([first, second], [1.0, weight], name, combination_type="cat")
            self.updates[name] = self.updates[first] + weight * self.updates[second]

    @invariant()
    def the_output_is_the_sum(self) -> None:
        if not hasattr(self, "model"):
            return
        names = {*self.merged, *self.active} if self.enabled else set()
        weight = self.expected_weight + sum(self.updates[name] for name in names)
        with torch.no_grad():
            expected = self.x @ weight.t() + self.model[0].bias
            assert_near(self.model(self.x), expected, 1e-5)
            with self.model.disable_adapter():
                base = nn.functional.linear(self.x, self.expected_weight, self.model[0].bias)
                assert torch.equal(self.model(self.x), base)

    @invariant()
    def the_books_agree(self) -> None:
        if hasattr(self, "model"):
            assert list(self.model.active_adapters) == self.active
            assert set(self.model.peft_config) == set(self.updates)
            assert {name.split(".")[2] for name in trainable(self.model)} <= set(self.active)

    @invariant()
    def the_base_is_untouched(self) -> None:
        if hasattr(self, "model") and not self.merged:
            assert torch.equal(self.model[0].weight, self.expected_weight)
            assert self.weight is None or self.model[0].weight is self.weight

    def teardown(self) -> None:
        if hasattr(self, "model"):
            released = self.model.unload()
            assert type(released[0]) is nn.Linear
            assert torch.equal(released[0].weight, self.expected_weight)


TestAdapters = Adapters.TestCase
TestAdapters.settings = settings(max_examples=30, stateful_step_count=15, deadline=None)


def test_training_one_adapter_leaves_the_other_and_the_base_alone() -> None:
    model = slimtune.get_peft_model(MIXTURE.model(), slimtune.LoraConfig(r=4, **MIXTURE.options()), "trained")
    model.add_adapter("resting", slimtune.LoraConfig(r=4, **MIXTURE.options()))
    for name in ("trained", "resting"):
        randomize(slimtune, model, name)
    resting = copies(adapter_tensors(slimtune, model, "resting"))
    trained = copies(adapter_tensors(slimtune, model, "trained"))
    base = {name: p.detach().clone() for name, p in model.named_parameters() if ".deltas." not in name}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)  # all of them, as careless code does
    for _ in range(2):
        optimizer.zero_grad()
        model(**MIXTURE.batch()).square().sum().backward()
        optimizer.step()
    assert_same(adapter_tensors(slimtune, model, "resting"), resting)
    assert_same({name: p for name, p in model.named_parameters() if name in base}, base)
    after = adapter_tensors(slimtune, model, "trained")
    assert [key for key in after if torch.equal(after[key], trained[key])] == []


def test_switching_back_and_forth_comes_back_to_the_bit() -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(r=4, **LLAMA.options()), "one")
    model.add_adapter("two", slimtune.LoraConfig(r=2, **LLAMA.options()))
    randomize(slimtune, model, "one", seed=3)
    randomize(slimtune, model, "two", seed=4)
    said = {}
    for name in ("one", "two", "one", "two"):
        model.set_adapter(name)
        output = predict(model, LLAMA.batch())
        assert torch.equal(said.setdefault(name, output), output)
    assert not torch.equal(said["one"], said["two"])


def test_adapters_on_different_modules_live_side_by_side() -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(target_modules=["q_proj"]), "queries")
    model.add_adapter("mlp", slimtune.LoraConfig(target_modules=["up_proj"]))
    randomize(slimtune, model, "queries")
    randomize(slimtune, model, "mlp")
    model.set_adapter("mlp")
    model.delete_adapter("queries")
    alone = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(target_modules=["up_proj"]))
    randomize(slimtune, alone)
    assert torch.equal(predict(model, LLAMA.batch()), predict(alone, LLAMA.batch()))
    assert not hasattr(model.model.layers[0].self_attn.q_proj, "lora_A")
