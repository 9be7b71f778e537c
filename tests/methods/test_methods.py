"""What holds for every method on every whole model that it attaches to; a new method enrols itself by its file."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import slimtune
from kinds import NEEDED
from slimtune.core.config import methods
from slimtune.core.delta import Delta
from slimtune.errors import ConfigError, MergeError, TargetError
from tensors import adapter_tensors, assert_near, assert_same, copies, loss_of, predict, randomize, trainable
from zoo import QUANTIZED, SPECIMENS, Specimen

BY_NAME = {specimen.name: specimen for specimen in SPECIMENS + QUANTIZED}


def default_config(method: str) -> Any:
    """The method as it is without a word; but without drawn masks, so that two forwards agree."""
    return methods()[method](inference_mode=False, **NEEDED.get(method, {}))


@functools.cache
def applicable() -> list[tuple[str, str]]:
    """The pairs of a method and a model on which the method's defaults attach."""
    found = []
    for method in sorted(methods()):
        for specimen in BY_NAME.values():
            try:
                slimtune.get_peft_model(specimen.model(), default_config(method))
            except (TargetError, ConfigError):
                continue
            found.append((method, specimen.name))
    return found


each_pair = pytest.mark.parametrize(("method", "on"), applicable(), ids=["-".join(pair) for pair in applicable()])


def attach(method: str, specimen: Specimen, adapter: str = "default") -> Any:
    torch.manual_seed(3)
    return slimtune.get_peft_model(specimen.model(), default_config(method), adapter_name=adapter)


def tuned(method: str, specimen: Specimen) -> Any:
    return randomize(slimtune, attach(method, specimen)).eval()


def folds(model: Any) -> bool:
    """Whether all of an adapter's deltas declare how they are written into weights."""
    deltas = [d for module in model.modules() for d in getattr(module, "deltas", {}).values()]
    return all((type(delta).fold is not Delta.fold or delta.holds) and not delta.unmergeable for delta in deltas)


def test_every_method_attaches_somewhere_by_default() -> None:
    assert {method for method, _ in applicable()} == set(methods())


def test_every_method_for_a_model_is_for_it_in_few_bits_too() -> None:
    on_model = {name: {method for method, on in applicable() if on == name} for name in BY_NAME}
    assert all(on_model[specimen.name] == on_model["llama"] for specimen in QUANTIZED)


@each_pair
def test_identity_at_initialisation(method: str, on: str) -> None:
    specimen = BY_NAME[on]
    model = attach(method, specimen)
    if model.active_peft_config.is_prompt_learning:
        pytest.skip("a soft prompt is there from the start")
    assert_near(predict(model, specimen.batch()), predict(specimen.model(), specimen.batch()), 1e-6)


@each_pair
def test_only_deltas_get_gradients_and_each_gets_one(method: str, on: str) -> None:
    specimen = BY_NAME[on]
    model = tuned(method, specimen).train()
    assert all("deltas." in name for name in trainable(model))
    loss_of(model, specimen.batch()).backward()
    assert [name for name, p in trainable(model).items() if p.grad is None] == []
    assert [name for name, p in model.named_parameters() if p.grad is not None and "deltas." not in name] == []
    # Rows that no token asks for, and layers whose output nobody reads, get zeros; but not the whole adapter.
    assert any(p.grad.any() for p in trainable(model).values())


@each_pair
def test_disabled_equals_the_base_to_the_bit_and_an_adapter_does_something(method: str, on: str) -> None:
    specimen = BY_NAME[on]
    expected = predict(specimen.model(), specimen.batch())
    model = tuned(method, specimen)
    changed = predict(model, specimen.batch())
    assert changed.shape != expected.shape or not torch.equal(changed, expected)
    with model.disable_adapter():
        assert torch.equal(predict(model, specimen.batch()), expected)
    assert torch.equal(predict(model, specimen.batch()), changed)


@each_pair
def test_detaching_gives_back_the_same_tensors(method: str, on: str) -> None:
    specimen = BY_NAME[on]
    plain = specimen.model()
    names = {name: id(parameter) for name, parameter in plain.named_parameters()}
    classes = [type(module) for module in plain.modules()]
    expected = predict(plain, specimen.batch())
    released = randomize(slimtune, slimtune.get_peft_model(plain, default_config(method))).unload()
    assert released is plain
    assert [type(module) for module in released.modules()] == classes
    assert {name: id(p) for name, p in released.named_parameters()} == names
    assert torch.equal(predict(released, specimen.batch()), expected)


@each_pair
def test_folding_equals_the_forward_or_is_refused(method: str, on: str) -> None:
    specimen = BY_NAME[on]
    model = tuned(method, specimen)
    unmerged = predict(model, specimen.batch())
    try:
        model.merge_adapter()
    except MergeError:
        if on != "mixture":  # a grouped convolution's update is not grouped
            assert not folds(model) or method == "BITFIT", "a method that folds must fold here"
        assert torch.equal(predict(model, specimen.batch()), unmerged)
        return
    assert_near(predict(model, specimen.batch()), unmerged, 1e-4)
    model.unmerge_adapter()
    assert torch.equal(predict(model, specimen.batch()), unmerged)


@pytest.mark.one_in(2)
@each_pair
def test_save_then_load_is_the_identity(method: str, on: str, tmp_path: Path) -> None:
    specimen = BY_NAME[on]
    model = tuned(method, specimen)
    model.save_pretrained(tmp_path)
    resumed = slimtune.PeftModel.from_pretrained(specimen.model(), tmp_path, is_trainable=True)
    assert_same(adapter_tensors(slimtune, resumed), adapter_tensors(slimtune, model))
    reread = slimtune.PeftModel.from_pretrained(specimen.model(), tmp_path)
    assert adapter_tensors(slimtune, reread).keys() <= adapter_tensors(slimtune, model).keys()
    assert torch.equal(predict(reread, specimen.batch()), predict(model, specimen.batch()))
    reread.save_pretrained(tmp_path / "again")
    again = slimtune.PeftModel.from_pretrained(specimen.model(), tmp_path / "again")
    assert torch.equal(predict(again, specimen.batch()), predict(model, specimen.batch()))


@pytest.mark.parametrize("method", sorted(methods()))
def test_an_adapter_s_tensors_are_a_state_dict_of_the_model(method: str) -> None:
    specimen = BY_NAME[next(on for name, on in applicable() if name == method)]
    tensors = copies(adapter_tensors(slimtune, tuned(method, specimen)))
    model = attach(method, specimen)
    assert model.load_state_dict(tensors) == ([], [])
    assert_same(adapter_tensors(slimtune, model), tensors)
    whole = copies(model.state_dict())
    other = attach(method, specimen)
    assert other.load_state_dict(whole) == ([], [])
    assert_same(other.state_dict(), whole)


@pytest.mark.one_in(2)
@each_pair
def test_two_adapters_do_not_disturb_each_other(method: str, on: str) -> None:
    specimen = BY_NAME[on]
    alone = predict(tuned(method, specimen), specimen.batch())
    model = tuned(method, specimen)
    model.add_adapter("other", default_config(method))
    randomize(slimtune, model, "other", seed=9)
    assert torch.equal(predict(model, specimen.batch()), alone)
    kept = copies(adapter_tensors(slimtune, model))
    model.set_adapter("other")
    assert not torch.equal(predict(model, specimen.batch()), alone)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    loss_of(model.train(), specimen.batch()).backward()
    optimizer.step()
    assert_same(adapter_tensors(slimtune, model), kept)
    model.set_adapter("default")
    assert torch.equal(predict(model, specimen.batch()), alone)
    model.delete_adapter("other")
    assert torch.equal(predict(model, specimen.batch()), alone)


@pytest.mark.one_in(3)
@each_pair
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_a_copy_is_equal_and_apart(method: str, on: str, copier: Any) -> None:
    specimen = BY_NAME[on]
    model = tuned(method, specimen)
    expected = predict(model, specimen.batch())
    twin = copier(model)
    assert torch.equal(predict(twin, specimen.batch()), expected)
    randomize(slimtune, twin, seed=77)
    assert not torch.equal(predict(twin, specimen.batch()), expected)
    assert torch.equal(predict(model, specimen.batch()), expected)
