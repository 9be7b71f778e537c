"""DoRA's ratio is kept while nothing is learned: the same outputs, and never that of an adapter which has changed."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtune
from slimtune.methods.lora.dora import DoraDelta
from tensors import adapter_tensors, assert_near, predict, randomize
from zoo import GPT2, LLAMA, MIXTURE, QUANTIZED, Specimen

BASES = [LLAMA, GPT2, *(base for base in QUANTIZED if "nf4" in base.name or "int8" in base.name)]
SITE = "model.layers.0.self_attn.q_proj"


def tuned(specimen: Specimen = LLAMA) -> Any:
    config = slimtune.LoraConfig(r=4, use_dora=True, **specimen.options())
    return randomize(slimtune, slimtune.get_peft_model(specimen.model(), config)).eval()


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each norm of a whole weight that is computed."""
    calls: list[int] = []
    own = DoraDelta.norms

    def counted(self: Any, weight: Tensor, squares_O: Tensor) -> Tensor:
        calls.append(len(weight))
        return own(self, weight, squares_O)

    monkeypatch.setattr(DoraDelta, "norms", counted)
    return calls


@pytest.mark.parametrize("specimen", [*BASES, MIXTURE], ids=lambda specimen: specimen.name)
def test_the_norm_is_computed_once_and_outputs_stay(specimen: Specimen, norms: list[int]) -> None:
    options = specimen.options()
    if specimen is MIXTURE:
        options["target_modules"] = [name for name in options["target_modules"] if name != "grouped"]
    config = slimtune.LoraConfig(r=4, use_dora=True, **options)
    model = randomize(slimtune, slimtune.get_peft_model(specimen.model(), config)).eval()
    batch = {name: tensor for name, tensor in specimen.batch().items() if name != "labels"}
    learning = model.train()(**batch)
    learning = (learning if isinstance(learning, Tensor) else learning.logits).detach()
    norms.clear()
    first = predict(model, batch)
    layers = len({id(module) for module in model.modules() if isinstance(module, DoraDelta)})
    uses = len(norms)
    assert uses == layers
    with torch.no_grad():
        again = model(**batch)
    assert len(norms) == uses
    assert torch.equal(again if isinstance(again, Tensor) else again.logits, first)
    assert_near(first, learning, 1e-5)


def test_a_step_of_decoding_reads_no_weight_for_a_norm(norms: list[int]) -> None:
    model = tuned()
    ids = LLAMA.batch()["input_ids"]
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6)
    assert len(norms) == 14


def test_nor_without_no_grad_where_the_adapter_is_frozen(norms: list[int]) -> None:
    model = tuned()
    model.set_adapter("default", inference_mode=True)
    for _ in range(3):
        model(**LLAMA.batch())
    assert len(norms) == 14


def test_one_vector_a_layer_is_kept() -> None:
    model = tuned()
    before = held_bytes()
    predict(model, LLAMA.batch())
    outputs = [delta.lora_magnitude_vector.numel() for delta in model.modules() if isinstance(delta, DoraDelta)]
    assert held_bytes() - before == 4 * sum(outputs)


def held_bytes() -> int:
    """Of all tensors that there are."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def delta(model: Any) -> Any:
    return model.get_submodule(SITE).deltas["default"]


def halve(parameter: Tensor) -> None:
    with torch.no_grad():
        parameter.mul_(0.5)


def in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        delta(model).lora_A.mul_(0.5)


def loaded(model: Any) -> None:
    halves = {name: 0.5 * tensor for name, tensor in adapter_tensors(slimtune, model).items()}
    slimtune.set_peft_model_state_dict(model, halves)


def assigned(model: Any) -> None:
    own = delta(model)
    own.load_state_dict({name: 0.5 * tensor for name, tensor in own.state_dict().items()}, assign=True)


def exchanged(model: Any) -> None:
    delta(model).lora_A = nn.Parameter(0.5 * delta(model).lora_A.detach())


def through_data(model: Any) -> None:
    delta(model).lora_A.data.mul_(0.5)
    model.eval()


def data_exchanged(model: Any) -> None:
    delta(model).lora_A.data = 0.5 * delta(model).lora_A.data


def rescaled(model: Any) -> None:
    delta(model).scaling *= 0.5


def trained(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(**LLAMA.batch()).loss.backward()
    optimizer.step()


def trained_through_data(model: Any) -> None:
    """A loop that never calls train(), whose optimizer leaves no trace."""
    model(**LLAMA.batch()).loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data -= 0.5 * parameter.grad


CHANGES: dict[str, Callable[[Any], Any]] = {
    "A in place": lambda model: halve(delta(model).lora_A),
    "B in place": lambda model: halve(delta(model).lora_B),
    "m in place": lambda model: halve(delta(model).lora_magnitude_vector),
    "the base in place": lambda model: halve(model.get_submodule(SITE).weight),
    "in inference mode": in_inference_mode,
    "loaded": loaded,
    "assigned": assigned,
    "another parameter": exchanged,
    "other data": data_exchanged,
    "through .data": through_data,
    "another scale": rescaled,
    "trained": trained,
    "trained through .data": trained_through_data,
    "in float64": lambda model: model.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_never_that_of_what_was_before(change: str) -> None:
    model, batch = tuned(), {"input_ids": LLAMA.batch()["input_ids"]}
    before = predict(model, batch)
    CHANGES[change](model)
    with torch.no_grad():
        after = model(**batch).logits
    # What is copied or pickled remembers nothing.
    assert torch.equal(after, predict(copy.deepcopy(model), batch))
    assert not torch.equal(after.float(), before)


def test_other_adapters_and_merges_leave_each_its_own() -> None:
    model, batch = tuned(), {"input_ids": LLAMA.batch()["input_ids"]}
    first = predict(model, batch)
    for name, options in {"other": {"use_dora": True}, "plain": {}}.items():
        model.add_adapter(name, slimtune.LoraConfig(r=2, **options, **LLAMA.options()))
        randomize(slimtune, model, name, seed=7)
    model.set_adapter("other", inference_mode=True)
    second = predict(model, batch)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(predict(model, batch), first)
    model.merge_adapter(["plain"])
    beside = predict(model, batch)
    assert torch.equal(beside, predict(copy.deepcopy(model), batch))
    assert not torch.equal(beside, first)
    model.unmerge_adapter()
    assert torch.equal(predict(model, batch), first)


def test_it_is_not_copied_nor_pickled() -> None:
    model = tuned()
    predict(model, LLAMA.batch())
    for other in (copy.deepcopy(delta(model)), pickle.loads(pickle.dumps(delta(model)))):
        assert other._ratio._value is None
    assert delta(model)._ratio._value is not None
