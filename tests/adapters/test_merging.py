"""Folding is a pure function: merged equals unmerged, and unmerging puts back what was there, to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import slimtune
from kinds import FLOATING, FOLDING, KINDS, Kind, attach, cases, folds, methods_for
from slimtune.core.config import PeftConfig
from slimtune.errors import MergeError
from tensors import (
    adapter_tensors,
    assert_near,
    assert_same,
    copies,
    loss_of,
    predict,
    randomize,
    relative_error,
    trainable,
)
from zoo import BERT, GPT2, LLAMA, SPECIMENS, TIED_LLAMA, Specimen

Case = tuple[Kind, PeftConfig]
GROUPED = next(kind for kind in KINDS if not kind.folds)
# A forward of one's own need not be linear in the weight, so its delta is around it and not inside.
OWN_FORWARD = next(kind for kind in KINDS if kind.name == "linear-with-own-forward")
FOLDABLE = tuple(kind for kind in FOLDING if kind is not OWN_FORWARD)
FOLDING_METHODS = tuple(sorted({name for kind in FOLDABLE for name in methods_for(kind) if folds(name)}))
MERGEABLE = [specimen for specimen in SPECIMENS if specimen.name != "mixture"]
each_mergeable = pytest.mark.parametrize("specimen", MERGEABLE, ids=lambda specimen: specimen.name)


def tuned(specimen: Specimen, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = slimtune.LoraConfig(r=4, **specimen.options(**options))
    return randomize(slimtune, slimtune.get_peft_model(specimen.model().to(dtype), config)).eval()


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.named_parameters() if ".deltas." not in name}


@given(cases(FOLDABLE, FOLDING_METHODS))
def test_folding_equals_the_forward(case: Case) -> None:
    kind, config = case
    model = randomize(slimtune, attach(kind, config)).eval()
    x = kind.input()
    unmerged = model(x)
    model.merge_adapter()
    assert_near(model(x), unmerged, 1e-5)
    assert_near(model.merge_and_unload()(x), unmerged, 1e-5)


@given(cases(FOLDABLE, FOLDING_METHODS), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_unmerging_is_exact_to_the_bit(case: Case, dtype: torch.dtype) -> None:
    kind, config = case
    host = kind.host().to(dtype)
    before = dict(host.named_parameters())
    values = copies(before)
    model = randomize(slimtune, slimtune.get_peft_model(host, config)).eval()
    adapter = copies(adapter_tensors(slimtune, model))
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    after = base_tensors(model)
    assert {name: id(tensor) for name, tensor in after.items()} == {name: id(t) for name, t in before.items()}
    assert_same(copies(after), values)
    assert_same(adapter_tensors(slimtune, model), adapter)


@given(cases(tuple(kind for kind in FOLDABLE if kind in FLOATING), ("LORA",), bias="none", use_dora=False))
def test_a_16_bit_merge_is_rounded_once(case: Case) -> None:
    """The merged weight is the 16-bit number nearest to the exact sum."""
    kind, config = case
    host = kind.host().to(torch.bfloat16)
    model = randomize(slimtune, slimtune.get_peft_model(host, config))
    adapter = {key: tensor.double() for key, tensor in adapter_tensors(slimtune, model).items()}
    exact = slimtune.get_peft_model(kind.host().to(torch.bfloat16).double(), config)
    slimtune.set_peft_model_state_dict(exact, adapter)
    merged, reference = model.merge_and_unload().site.weight, exact.merge_and_unload().site.weight
    assert merged.dtype == torch.bfloat16
    nearest = reference.to(torch.bfloat16)
    # The sum is formed in float32: only within its own rounding of a tie may the choice differ.
    undecided = (reference - merged.double()).abs() <= (reference - nearest.double()).abs() + 1e-6
    assert bool(undecided.all())
    assert (merged == nearest).double().mean() > 0.99


@given(cases((GROUPED,), ("LORA",)))
def test_a_merge_that_cannot_be_done_changes_nothing(case: Case) -> None:
    kind, config = case
    model = randomize(slimtune, attach(kind, config)).eval()
    before, expected = copies(base_tensors(model)), model(kind.input())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="site"):
            merge()
        assert_same(copies(base_tensors(model)), before)
        assert torch.equal(model(kind.input()), expected)


@given(cases((OWN_FORWARD,), ("LORA",), lora_dropout=0.0))
def test_a_forward_of_one_s_own_is_merged_right_or_not_at_all(case: Case) -> None:
    """2 tanh(W x) + s B A x is no 2 tanh(W' x): a merge must say so rather than answer something else."""
    kind, config = case
    model = randomize(slimtune, attach(kind, config)).eval()
    expected = model(kind.input())
    try:
        merged = model.merge_and_unload()
    except MergeError:
        assert torch.equal(model(kind.input()), expected)
    else:
        assert_near(merged(kind.input()), expected, 1e-5)


@each_mergeable
def test_merged_models_say_the_same(specimen: Specimen) -> None:
    model = tuned(specimen)
    batch = specimen.batch()
    unmerged = predict(model, batch)
    model.merge_adapter()
    assert_near(predict(model, batch), unmerged)
    with model.disable_adapter():
        assert torch.equal(predict(model, batch), predict(specimen.model(), batch))
    assert_near(predict(model, batch), unmerged)
    model.unmerge_adapter()
    assert torch.equal(predict(model, batch), unmerged)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(specimen.model())
    assert not isinstance(merged, slimtune.PeftModel)
    assert sorted(merged.state_dict()) == sorted(specimen.model().state_dict())
    assert_near(predict(merged, batch), unmerged)


@each_mergeable
def test_merging_leaves_what_has_no_delta_alone(specimen: Specimen) -> None:
    model = tuned(specimen)
    adapted = {name.partition(".deltas.")[0] for name, _ in model.named_parameters() if ".deltas." in name}
    before = {name: id(tensor) for name, tensor in base_tensors(model).items()}
    after = {name: id(tensor) for name, tensor in model.merge_and_unload().named_parameters()}
    changed = {name.rpartition(".")[0] for name in before if after[name] != before[name]}
    assert changed == adapted


def test_merging_two_adapters_is_merging_their_sum() -> None:
    model = tuned(LLAMA)
    model.add_adapter("other", slimtune.LoraConfig(r=2, **LLAMA.options()))
    randomize(slimtune, model, "other", seed=9)
    model.set_adapter(["default", "other"])
    both = predict(model, LLAMA.batch())
    model.set_adapter("default")
    one = predict(model, LLAMA.batch())
    model.merge_adapter(["default", "other"])
    assert_near(predict(model, LLAMA.batch()), both)
    model.unmerge_adapter()
    assert torch.equal(predict(model, LLAMA.batch()), one)
    model.merge_adapter(["default"])
    model.set_adapter(["default", "other"])
    assert_near(predict(model, LLAMA.batch()), both, what="one merged, one around it")


def test_merging_what_is_merged_warns_and_changes_nothing() -> None:
    model = tuned(LLAMA)
    model.merge_adapter()
    merged = predict(model, LLAMA.batch())
    with pytest.warns(UserWarning, match="default: merged already"):
        model.merge_adapter()
    assert torch.equal(predict(model, LLAMA.batch()), merged)


def two_adapters(use_dora: bool = False) -> tuple[Any, torch.Tensor]:
    model = tuned(LLAMA, use_dora=use_dora)
    model.add_adapter("b", slimtune.LoraConfig(r=2, use_dora=use_dora, **LLAMA.options()))
    randomize(slimtune, model, "b", seed=9)
    together = copy.deepcopy(model)
    return model, predict(together.merge_and_unload(adapter_names=["default", "b"]), LLAMA.batch())


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_what_is_not_merged_yet_is_merged_beside_what_is(use_dora: bool) -> None:
    """One after the other is both at once, to the bit, and unmerging takes out both."""
    model, expected = two_adapters(use_dora)
    frozen = {name: tensor.clone() for name, tensor in base_tensors(model).items()}
    model.merge_adapter(["default"])
    model.merge_adapter(["b"])
    assert torch.equal(predict(model, LLAMA.batch()), expected)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in base_tensors(model).items())

    model.merge_adapter(["default"])
    assert torch.equal(
        predict(copy.deepcopy(model).merge_and_unload(adapter_names=["default", "b"]), LLAMA.batch()), expected
    )
    assert torch.equal(predict(copy.deepcopy(model).merge_and_unload(adapter_names=["b"]), LLAMA.batch()), expected)
    model.set_adapter("b")
    assert torch.equal(predict(model.merge_and_unload(), LLAMA.batch()), expected)


def test_a_second_merge_that_fails_leaves_the_first() -> None:
    model, _ = two_adapters()
    broken = copies(adapter_tensors(slimtune, model, "b"))
    broken[max(broken)][0, 0] = float("nan")
    slimtune.set_peft_model_state_dict(model, broken, adapter_name="b")
    model.merge_adapter(["default"])
    expected = predict(model, LLAMA.batch())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="infinite or not a number"):
            merge(adapter_names=["b"])
        assert torch.equal(predict(model, LLAMA.batch()), expected)
    with model.disable_adapter():
        assert_near(predict(model, LLAMA.batch()), predict(LLAMA.model(), LLAMA.batch()))


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["norm"]}, {"bias": "all"}, {"trainable_token_indices": [3, 5]}],
    ids=["whole", "bias", "token"],
)
def test_two_adapters_that_trained_the_same_thing_do_not_merge(options: dict[str, Any]) -> None:
    specimen = LLAMA if "bias" not in options else GPT2
    model = tuned(specimen, **options)
    model.add_adapter("b", slimtune.LoraConfig(r=2, **specimen.options(**options)))
    before = predict(model, specimen.batch())
    with pytest.raises(MergeError, match=r"each train their own copy of what '.*' has"):
        model.merge_adapter(["default", "b"])
    model.merge_adapter(["default"])
    with pytest.raises(MergeError, match="merge one of them"):
        model.merge_and_unload(adapter_names=["b"])
    assert_near(predict(model, specimen.batch()), before)


def test_a_merged_adapter_is_saved_as_it_was(tmp_path: Any) -> None:
    model = tuned(LLAMA)
    before = copies(adapter_tensors(slimtune, model))
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    reread = slimtune.PeftModel.from_pretrained(LLAMA.model(), tmp_path)
    assert_same(adapter_tensors(slimtune, reread), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("safe_merge", [True, False])
def test_a_broken_adapter_is_not_merged(value: float, safe_merge: bool) -> None:
    model = tuned(LLAMA)
    before = {name: id(tensor) for name, tensor in base_tensors(model).items()}
    broken = copies(adapter_tensors(slimtune, model))
    last = max(broken)
    broken[last][0, 0] = value
    slimtune.set_peft_model_state_dict(model, broken)
    with pytest.raises(MergeError, match="layers"):
        model.merge_adapter(safe_merge=safe_merge)
    assert {name: id(tensor) for name, tensor in base_tensors(model).items()} == before


@pytest.mark.parametrize("specimen", [LLAMA, GPT2, BERT], ids=lambda specimen: specimen.name)
def test_a_bf16_model_merges_within_rounding(specimen: Specimen) -> None:
    model = tuned(specimen, torch.bfloat16)
    unmerged = predict(model, specimen.batch())
    base = predict(specimen.model().to(torch.bfloat16), specimen.batch())
    drift = relative_error(predict(model.merge_and_unload(safe_merge=True), specimen.batch()), unmerged)
    effect = relative_error(base, unmerged)
    assert drift < 0.1 * effect


def test_a_merged_model_is_saved_and_reloaded_by_transformers(tmp_path: Any) -> None:
    for specimen in (LLAMA, TIED_LLAMA, GPT2, BERT):
        model = tuned(specimen)
        expected = predict(model, specimen.batch())
        folder = tmp_path / specimen.name
        model.merge_and_unload().save_pretrained(folder)
        assert not (folder / "adapter_config.json").exists()
        assert_near(predict(type(specimen.model()).from_pretrained(folder), specimen.batch()), expected)


def test_training_goes_on_after_unmerging() -> None:
    model = tuned(LLAMA)
    model.merge_adapter()
    model.unmerge_adapter()
    loss_of(model.train(), LLAMA.batch()).backward()
    assert [name for name, p in trainable(model).items() if p.grad is None] == []


def test_a_forward_on_the_instance_that_changes_what_a_weight_means() -> None:
    model = LLAMA.model()
    layer = model.model.layers[0].self_attn.q_proj
    plain = type(layer).forward
    layer.forward = lambda x: 2.0 * plain(layer, x).tanh()
    tuned = slimtune.get_peft_model(model, slimtune.LoraConfig(r=4, target_modules=["q_proj"]))
    randomize(slimtune, tuned).eval()
    before = predict(tuned, LLAMA.batch())
    with pytest.raises(MergeError, match="forward of its own"):
        tuned.merge_adapter()
    assert torch.equal(predict(tuned, LLAMA.batch()), before)
