"""A copy of an adopted model is a model of its own: deepcopy, pickle, state dict."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slimtune
from kinds import Kind, attach, cases
from slimtune.core.config import PeftConfig
from tensors import adapter_tensors, assert_same, copies, loss_of, parts, predict, randomize, trainable
from zoo import SPECIMENS, Specimen

Copier = Callable[[Any], Any]


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


COPIERS: dict[str, Copier] = {"deepcopy": copy.deepcopy, "pickle": pickled}
each_copier = pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)


@each_copier
@given(case=cases())
def test_a_copy_is_equal_and_apart(copier: Copier, case: tuple[Kind, PeftConfig]) -> None:
    kind, config = case
    model = randomize(slimtune, attach(kind, config)).eval()
    twin = copier(model)
    x = kind.input()
    expected = model(x)
    assert torch.equal(twin(x), expected)
    assert isinstance(twin, slimtune.PeftModel)
    assert isinstance(twin.site, type(kind.host().site))
    assert twin.peft_config["default"].to_dict() == config.to_dict()
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert list(trainable(twin)) == list(trainable(model))
    mine, its = (parts(dict(m.named_parameters())).values() for m in (model, twin))
    assert {p.data_ptr() for p in mine}.isdisjoint(p.data_ptr() for p in its)

    randomize(slimtune, twin, seed=77)
    twin.disable_adapter_layers()
    assert torch.equal(model(x), expected), "what happens to the copy doesn't reach the original"
    twin.enable_adapter_layers()
    assert not torch.equal(twin(x), expected)
    assert torch.equal(twin.unload()(x), kind.host()(x))
    assert torch.equal(model(x), expected)


@each_copier
@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
def test_a_copy_of_a_whole_model(copier: Copier, specimen: Specimen) -> None:
    model = slimtune.get_peft_model(specimen.model(), slimtune.LoraConfig(r=4, **specimen.options()))
    randomize(slimtune, model)
    twin = copier(model)
    assert torch.equal(predict(twin, specimen.batch()), predict(model, specimen.batch()))
    loss_of(twin.train(), specimen.batch()).backward()
    assert [name for name, p in trainable(twin).items() if p.grad is None] == []
    assert [name for name, p in model.named_parameters() if p.grad is not None] == []
    assert tied(twin) == tied(model)


def tied(model: torch.nn.Module) -> list[set[str]]:
    """Groups of names that stand for one parameter."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return sorted((group for group in groups.values() if len(group) > 1), key=sorted)


@given(cases(), st.booleans())
def test_a_state_dict_goes_round(case: tuple[Kind, PeftConfig], strict: bool) -> None:
    kind, config = case
    model = randomize(slimtune, attach(kind, config)).eval()
    twin = attach(kind, config).eval()
    result = twin.load_state_dict(model.state_dict(), strict=strict)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(twin(kind.input()), model(kind.input()))


def test_torch_save_and_load(tmp_path: Any) -> None:
    """The usual way to keep a whole model of one's own."""
    specimen = SPECIMENS[0]
    model = slimtune.get_peft_model(specimen.model(), slimtune.LoraConfig(r=4, **specimen.options()))
    randomize(slimtune, model)
    torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_same(adapter_tensors(slimtune, twin), copies(adapter_tensors(slimtune, model)))
    assert torch.equal(predict(twin, specimen.batch()), predict(model, specimen.batch()))
