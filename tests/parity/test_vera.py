"""VeRA is what it is in peft, its shared matrices are there once, and its formula is the paper's."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import slimtune
from beside_peft import Agreement, Case, check_generation
from slimtune.errors import BaseMismatchError, ConfigError, TargetError
from tensors import adapter_tensors, assert_near, assert_same, predict, randomize
from zoo import BERT, GPT2, LLAMA, LLAMA_LINEARS, QWEN2, T5

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LINEARS = {"target_modules": LLAMA_LINEARS, "r": 16}
CASES = {
    "defaults": Case("VeraConfig", LLAMA, {"target_modules": LLAMA_LINEARS}),
    "two-modules": Case("VeraConfig", LLAMA, {"target_modules": ["q_proj", "down_proj"], "r": 5}),
    "seed": Case("VeraConfig", LLAMA, {**LINEARS, "projection_prng_key": 11}),
    "not-saved": Case("VeraConfig", LLAMA, {**LINEARS, "save_projection": False, "projection_prng_key": 3}),
    "layers": Case("VeraConfig", LLAMA, {**LINEARS, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "bias": Case("VeraConfig", QWEN2, {**LINEARS, "bias": "vera_only"}),
    "bias-all": Case("VeraConfig", QWEN2, {**LINEARS, "bias": "all"}),
    "conv1d": Case("VeraConfig", GPT2, {"target_modules": ["c_attn", "c_fc"], "r": 8, "fan_in_fan_out": True}),
    "classifier": Case("VeraConfig", BERT, {"target_modules": ["query", "value"], "r": 8, "task_type": "SEQ_CLS"}),
    "encoder-decoder": Case("VeraConfig", T5, {"target_modules": ["q", "wo"], "r": 8}),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class TestAgreement(Agreement):
    cases = CASES


def test_generation_agrees() -> None:
    check_generation("VeraConfig", **LINEARS)


@each_case
def test_a_fresh_adapter_is_that_of_peft_to_the_bit(case: Case) -> None:
    assert_same(adapter_tensors(slimtune, case.model(slimtune)), adapter_tensors(peft, case.model(peft)))


def test_the_formula() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    model = randomize(slimtune, slimtune.get_peft_model(model, slimtune.VeraConfig(r=3, target_modules=["0", "2"])))
    tensors = adapter_tensors(slimtune, model)
    a, b = tensors["base_model.vera_A"], tensors["base_model.vera_B"]
    assert (a.shape, b.shape) == ((3, 9), (9, 3))
    y = x
    for name, features_in, features_out in (("0", 6, 9), ("2", 9, 4)):
        weight, bias = model.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.bias")
        vectors = (tensors[f"base_model.model.{name}.vera_lambda_{letter}"] for letter in "bd")
        diagonal_b, diagonal_d = (torch.diag(vector) for vector in vectors)
        update = diagonal_b @ b[:features_out] @ diagonal_d @ a[:, :features_in]
        y = y @ (weight + update).T + bias
        y = y.tanh() if name == "0" else y
    assert_near(model(x), y, 1e-12)


def projections(model: nn.Module) -> set[int]:
    """The addresses of the shared matrices, whichever layer is asked."""
    return {
        buffer.data_ptr()
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name.endswith(("projection.a", "projection.b"))
    }


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.to(torch.float64),
        lambda model: model.half().float(),
    ],
    ids=["deepcopy", "pickle", "float64", "half-and-back"],
)
def test_the_shared_matrices_stay_one_pair(change: Any) -> None:
    model = CASES["defaults"].tuned(slimtune)
    assert len(projections(model)) == 2
    assert len(projections(change(model))) == 2


def test_a_16_bit_base_gets_float32_vectors_and_keeps_its_own_dtype() -> None:
    model = slimtune.get_peft_model(LLAMA.model().bfloat16(), slimtune.VeraConfig(**LINEARS))
    assert {tensor.dtype for tensor in adapter_tensors(slimtune, model).values()} == {torch.float32}
    assert predict(randomize(slimtune, model), LLAMA.batch()).dtype == torch.bfloat16


def test_matrices_that_are_not_saved_are_not_in_the_file_and_drawn_again(tmp_path: Path) -> None:
    model = CASES["not-saved"].tuned(slimtune)
    assert [name for name in adapter_tensors(slimtune, model) if "vera_A" in name or "vera_B" in name] == []
    model.save_pretrained(tmp_path)
    reread = slimtune.PeftModel.from_pretrained(LLAMA.model(), tmp_path)
    assert torch.equal(predict(reread, LLAMA.batch()), predict(model, LLAMA.batch()))


def test_a_file_without_the_matrices_that_its_config_promises_is_refused(tmp_path: Path) -> None:
    model = CASES["not-saved"].tuned(slimtune)
    model.peft_config["default"].save_projection = True
    model.save_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError, match=r"lacks base_model\.vera_A, base_model\.vera_B"):
        slimtune.PeftModel.from_pretrained(LLAMA.model(), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, found 0"),
        ({"r": 2.5}, "r must be a whole number"),
        ({"projection_prng_key": -1}, "projection_prng_key must be a whole number of at least 0"),
        ({"vera_dropout": 1.0}, r"vera_dropout must be a number in \[0, 1\), found 1.0"),
        ({"d_initial": "small"}, "d_initial must be a number, found 'small'"),
        ({"bias": "vera"}, "bias must be one of none, all, vera_only, found 'vera'"),
        ({"init_weights": "gaussian"}, "init_weights must be one of True, False"),
        ({"layers_pattern": "h"}, "give layers_to_transform as well"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 1}, "needs target_modules as a list"),
        ({"vera_droput": 0.1}, "did you mean 'vera_dropout'"),
    ],
)
def test_bad_fields_are_refused_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        slimtune.VeraConfig(**options)


def test_other_layers_than_linear_are_refused() -> None:
    with pytest.raises(TargetError, match=r"VeRA can't attach to 'model\.embed_tokens', a Embedding; it takes linear"):
        slimtune.get_peft_model(LLAMA.model(), slimtune.VeraConfig(target_modules=["embed_tokens"]))
