"""16-bit bases, autocast and casts: adapters stay in float32 where they are trained, and results stay right."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import slimtune
from tensors import (
    adapter_gradients,
    adapter_tensors,
    assert_near,
    copies,
    loss_of,
    predict,
    randomize,
    relative_error,
    trainable,
)
from zoo import BERT, GPT2, LLAMA, Specimen

LOW = [torch.bfloat16, torch.float16]


def tuned(library: ModuleType, specimen: Specimen, dtype: torch.dtype, **options: Any) -> Any:
    config = library.LoraConfig(r=4, **specimen.options())
    return randomize(library, library.get_peft_model(specimen.model().to(dtype), config, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("specimen", [LLAMA, GPT2, BERT], ids=lambda specimen: specimen.name)
def test_the_adapter_has_the_dtype_that_peft_gives_it(
    specimen: Specimen, dtype: torch.dtype, autocast_adapter_dtype: bool
) -> None:
    dtypes = []
    for library in (slimtune, peft):
        model = tuned(library, specimen, dtype, autocast_adapter_dtype=autocast_adapter_dtype)
        dtypes.append({key: tensor.dtype for key, tensor in adapter_tensors(library, model).items()})
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("specimen", [LLAMA, GPT2, BERT], ids=lambda specimen: specimen.name)
def test_a_16_bit_model_is_no_further_from_float32_than_peft_s(specimen: Specimen, dtype: torch.dtype) -> None:
    exact = predict(tuned(slimtune, specimen, torch.float32), specimen.batch())
    errors = []
    for library in (slimtune, peft):
        output = predict(tuned(library, specimen, dtype), specimen.batch())
        assert output.dtype == dtype
        errors.append(relative_error(output, exact))
    assert errors[0] <= 2 * errors[1], "two roundings of one value differ by chance, not by a factor"


def gradients(
    library: ModuleType, specimen: Specimen, seed: int, dtype: torch.dtype, autocast: bool = False
) -> dict[str, Tensor]:
    model = randomize(library, tuned(library, specimen, dtype), seed=seed).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = loss_of(model, specimen.batch())
    loss.backward()
    found = copies(adapter_gradients(library, model))
    assert {tensor.dtype for key, tensor in found.items() if "lora_" in key} == {torch.float32}
    return {key: tensor.float() for key, tensor in found.items()}


def distance(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Between two whole gradients, against the length of the expected one."""
    assert sorted(actual) == sorted(expected)
    squares = sum((actual[key] - expected[key]).square().sum() for key in expected)
    return float((squares / sum(tensor.square().sum() for tensor in expected.values())).sqrt())


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize("specimen", [LLAMA, GPT2, BERT], ids=lambda specimen: specimen.name)
def test_gradients_in_bf16_are_about_as_near_to_float32_as_peft_s(
    specimen: Specimen, dtype: torch.dtype, autocast: bool
) -> None:
    """On average over adapters: the rounding of a single one is a matter of chance."""
    errors = []
    for seed in range(6):
        exact = gradients(peft, specimen, seed, torch.float32)
        errors.append([distance(gradients(lib, specimen, seed, dtype, autocast), exact) for lib in (slimtune, peft)])
    ours, theirs = (sum(column) / len(column) for column in zip(*errors, strict=True))
    assert 0 < ours <= 1.5 * theirs
    assert theirs < 0.1, "the yardstick itself is no worse than bf16 is"


def test_three_steps_over_a_bf16_base_move_a_float32_adapter() -> None:
    """In bf16 itself, steps of 1e-4 on values of 0.2 would vanish in rounding."""
    model = tuned(slimtune, LLAMA, torch.bfloat16).train()
    before = copies(adapter_tensors(slimtune, model))
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-4)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, LLAMA.batch())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    after = adapter_tensors(slimtune, model)
    assert all((after[key] != before[key]).float().mean() > 0.9 for key in before)
    assert losses[2] < losses[0]


@pytest.mark.parametrize("specimen", [LLAMA, GPT2, BERT], ids=lambda specimen: specimen.name)
def test_under_autocast_outputs_are_peft_s(specimen: Specimen) -> None:
    exact = predict(tuned(slimtune, specimen, torch.float32), specimen.batch())
    outputs = []
    for library in (slimtune, peft):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(predict(tuned(library, specimen, torch.float32), specimen.batch()))
    ours, theirs = outputs
    assert ours.dtype == theirs.dtype
    assert 0 < relative_error(ours, exact) <= 2 * relative_error(theirs, exact)


def test_a_cast_of_the_whole_model_casts_the_adapter_too() -> None:
    model = tuned(slimtune, LLAMA, torch.float32)
    expected = predict(model, LLAMA.batch())
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert_near(predict(model, LLAMA.batch()), expected, 1e-5)
    model.to(torch.bfloat16)
    assert predict(model, LLAMA.batch()).dtype == torch.bfloat16


def test_attaching_casts_nothing_of_the_base() -> None:
    """No blanket upcast: norms and embeddings keep the dtype that they had."""
    plain = LLAMA.model().to(torch.bfloat16)
    plain.model.norm.to(torch.float32)
    before = {name: p.dtype for name, p in plain.named_parameters()}
    model = slimtune.get_peft_model(plain, slimtune.LoraConfig(r=4, **LLAMA.options()))
    assert {name: p.dtype for name, p in model.named_parameters() if ".deltas." not in name} == before
