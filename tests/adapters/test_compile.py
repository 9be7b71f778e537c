"""torch.compile of forward and backward: the numbers of the model that isn't compiled."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch

import slimtune
from kinds import KINDS, Kind, attach, methods_for
from tensors import adapter_gradients, assert_all_near, assert_near, copies, loss_of, predict, randomize
from zoo import LLAMA, MIXTURE, Specimen


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def tuned(specimen: Specimen) -> Any:
    config = slimtune.LoraConfig(r=4, **specimen.options())
    return randomize(slimtune, slimtune.get_peft_model(specimen.model(), config))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("specimen", [LLAMA, MIXTURE], ids=lambda specimen: specimen.name)
def test_forward_and_backward(specimen: Specimen) -> None:
    """With `aot_eager` the graph is traced, split into forward and backward, and run without a C++ compiler."""
    model = tuned(specimen)
    compiled = torch.compile(model, backend="aot_eager")
    expected = predict(model, specimen.batch())
    assert_near(predict(compiled, specimen.batch()), expected, 1e-5)
    found = []
    for each in (model, compiled):
        model.zero_grad()
        loss = loss_of(each.train(), specimen.batch())
        loss.backward()
        found.append((loss.detach(), copies(adapter_gradients(slimtune, model))))
    assert_near(found[1][0], found[0][0], 1e-5)
    assert_all_near(found[1][1], found[0][1], 1e-5)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "LORA" in methods_for(kind)], ids=repr)
def test_an_adopted_layer_is_one_graph(kind: Kind) -> None:
    config = slimtune.LoraConfig(r=kind.rank_step, target_modules=["site"], bias="lora_only")
    model = randomize(slimtune, attach(kind, config)).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_near(compiled(kind.input()), model(kind.input()), 1e-6)


WHOLE_MODELS = {
    "ia3": slimtune.IA3Config(),
    "bitfit": slimtune.BitFitConfig(add_bias=True),
    "ln-tuning": slimtune.LNTuningConfig(),
    "full-difference": slimtune.FullConfig(),
    "full-whole": slimtune.FullConfig(store="whole"),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_a_model_whose_parameters_are_changed_is_one_graph(name: str) -> None:
    # In float64: the gradients of some biases are what is left of sums that cancel.
    model = slimtune.get_peft_model(LLAMA.model().double(), copy.deepcopy(WHOLE_MODELS[name]))
    ids = {"input_ids": LLAMA.batch()["input_ids"]}
    randomize(slimtune, model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for each in (model, compiled):
        model.zero_grad()
        logits = each(**ids).logits
        logits.square().sum().backward()
        found.append((logits.detach(), copies(adapter_gradients(slimtune, model))))
    assert_near(found[1][0], found[0][0], 1e-6)
    assert_all_near(found[1][1], found[0][1], 1e-5)


@pytest.mark.slow
def test_switching_adapters_reaches_the_compiled_model() -> None:
    model = tuned(LLAMA)
    model.add_adapter("other", slimtune.LoraConfig(r=2, **LLAMA.options()))
    randomize(slimtune, model, "other", seed=6)
    compiled = torch.compile(model, backend="eager")
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        assert_near(predict(compiled, LLAMA.batch()), predict(model, LLAMA.batch()), 1e-6)
    with model.disable_adapter():
        assert_near(predict(compiled, LLAMA.batch()), predict(LLAMA.model(), LLAMA.batch()), 1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_default_backend() -> None:
    """Inductor; one small module keeps it to seconds."""
    config = slimtune.LoraConfig(r=2, target_modules=["0"])
    model = randomize(slimtune, slimtune.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), config)).train()
    x = torch.randn(3, 8)
    found = []
    for each in (model, torch.compile(model)):
        model.zero_grad()
        y = each(x)
        y.square().sum().backward()
        found.append((y.detach(), copies(adapter_gradients(slimtune, model))))
    assert_near(found[1][0], found[0][0], 1e-5)
    assert_all_near(found[1][1], found[0][1], 1e-5)
