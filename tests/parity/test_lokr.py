"""LoKr is what it is in peft, and its formula is the paper's, without the product of its two factors being made."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lokr.layer import factorization as factorization_of_peft
from torch import Tensor, nn

import slimtune
from beside_peft import Agreement, Case, check_generation
from slimtune.errors import ConfigError, TargetError
from slimtune.methods.lycoris.lokr import factorization
from tensors import adapter_tensors, assert_near, predict, randomize, trainable
from zoo import BERT, GPT2, LLAMA, LLAMA_LINEARS, MIXTURE, T5

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LINEARS = {"target_modules": LLAMA_LINEARS, "r": 2}
CONVOLUTIONS = {"target_modules": ["conv1d", "conv2d", "grouped", "shared", "out"], "r": 1}
CASES = {
    "defaults": Case("LoKrConfig", LLAMA, {"target_modules": LLAMA_LINEARS}),
    "low-rank": Case("LoKrConfig", LLAMA, {**LINEARS, "alpha": 3}),
    "decompose-both": Case("LoKrConfig", LLAMA, {**LINEARS, "r": 1, "decompose_both": True}),
    "factor": Case("LoKrConfig", LLAMA, {**LINEARS, "decompose_factor": 4}),
    "factor-that-does-not-divide": Case("LoKrConfig", LLAMA, {**LINEARS, "decompose_factor": 5}),
    "large-factor": Case("LoKrConfig", LLAMA, {**LINEARS, "decompose_factor": 16, "decompose_both": True}),
    "patterns": Case(
        "LoKrConfig", LLAMA, {**LINEARS, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {r".*\.1\..*v_proj": 5}}
    ),
    "layers": Case("LoKrConfig", LLAMA, {**LINEARS, "layers_to_transform": [1], "exclude_modules": ["q_proj"]}),
    "convolutions": Case("LoKrConfig", MIXTURE, CONVOLUTIONS),
    "whole-convolutions": Case("LoKrConfig", MIXTURE, {**CONVOLUTIONS, "r": 8}),
    # In one dimension peft 0.21 can't make this product: torch.kron refuses its strides.
    "effective-convolutions": Case(
        "LoKrConfig",
        MIXTURE,
        {"target_modules": ["conv2d", "grouped"], "r": 1, "alpha": 300, "use_effective_conv2d": True},
    ),
    "convolutions-of-both": Case("LoKrConfig", MIXTURE, {**CONVOLUTIONS, "decompose_both": True}),
    "classifier": Case("LoKrConfig", BERT, {"target_modules": ["query", "value"], "r": 4, "task_type": "SEQ_CLS"}),
    "encoder-decoder": Case("LoKrConfig", T5, {"target_modules": ["q", "wo"], "r": 4}),
}


class TestAgreement(Agreement):
    cases = CASES


def test_generation_agrees() -> None:
    check_generation("LoKrConfig", **LINEARS)


@given(st.integers(1, 3000), st.one_of(st.just(-1), st.integers(1, 70)))
def test_dimensions_are_split_as_in_peft(dimension: int, factor: int) -> None:
    assert factorization(dimension, factor) == factorization_of_peft(dimension, factor)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("name", ["low-rank", "convolutions"])
def test_dropped_modules_and_outputs_are_those_of_peft_with_the_same_seed(name: str, scaled: bool) -> None:
    dropout = {"rank_dropout": 0.4, "module_dropout": 0.3, "rank_dropout_scale": scaled}
    case = Case("LoKrConfig", CASES[name].specimen, {**CASES[name].options, **dropout})
    outputs = []
    for library in (slimtune, peft):
        model = case.tuned(library).train()
        torch.manual_seed(5)
        output = model(**{key: value for key, value in case.batch().items() if key != "labels"})
        outputs.append(output if isinstance(output, Tensor) else output.logits)
    assert_near(*outputs)
    assert (outputs[0] - predict(case.tuned(slimtune), case.batch())).abs().max() > 1e-3


@pytest.mark.parametrize(("init", "zero"), [(True, "w1"), ("lycoris", "w2"), (False, "nothing")])
@pytest.mark.parametrize("decompose_both", [True, False])
def test_an_adapter_starts_where_peft_s_does(init: Any, zero: str, decompose_both: bool) -> None:
    options = {**LINEARS, "init_weights": init, "decompose_both": decompose_both, "r": 1}
    zeros = []
    for library in (slimtune, peft):
        tensors = adapter_tensors(library, Case("LoKrConfig", LLAMA, options).model(library))
        zeros.append({key for key, tensor in tensors.items() if not tensor.any()})
    assert zeros[0] == zeros[1]
    assert all(f"lokr_{zero}" in key for key in zeros[0])
    assert bool(zeros[0]) == (init is not False)


@pytest.mark.parametrize("factor", [-1, 2, 3])
def test_the_formula(factor: int) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 30)).double()
    config = slimtune.LoKrConfig(r=1, alpha=3, target_modules=["0"], decompose_factor=factor)
    model: Any = randomize(slimtune, slimtune.get_peft_model(base, config))
    t = {key.rpartition("lokr_")[2]: tensor for key, tensor in adapter_tensors(slimtune, model).items()}
    x = torch.randn(5, 12, dtype=torch.float64)
    with model.disable_adapter():
        expected = model(x) + 3 * x @ torch.kron(t["w1"], t["w2_a"] @ t["w2_b"]).T
    assert_near(model(x), expected, 1e-12)


EFFECTIVE = {"use_effective_conv2d": True}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "module", [nn.Conv1d(9, 6, 3), nn.Conv2d(9, 6, (3, 2)), nn.Conv2d(8, 6, 3, groups=2)], ids=repr
)
@pytest.mark.parametrize("options", [{"r": 1}, {"r": 9}, {"r": 1, **EFFECTIVE}], ids=["low-rank", "whole", "effective"])
def test_gradients_of_convolutions_are_those_of_finite_differences(module: Any, options: dict[str, Any]) -> None:
    config = slimtune.LoKrConfig(target_modules=["0"], **options)
    model = slimtune.get_peft_model(nn.Sequential(copy.deepcopy(module)), config)
    model = randomize(slimtune, model).double()
    x = torch.randn(2, module.in_channels, *[5] * len(module.kernel_size), dtype=torch.float64, requires_grad=True)
    factors = trainable(model)

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(factors, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *factors.values()))


def test_gpt2_s_conv1d_is_a_linear_layer() -> None:
    model: Any = randomize(
        slimtune, slimtune.get_peft_model(GPT2.model(), slimtune.LoKrConfig(target_modules=["c_attn"]))
    )
    expected = predict(model, GPT2.batch())
    assert_near(predict(model.merge_and_unload(), GPT2.batch()), expected)


def test_a_16_bit_base_keeps_its_dtype_with_a_float32_adapter() -> None:
    model = slimtune.get_peft_model(LLAMA.model().bfloat16(), slimtune.LoKrConfig(**LINEARS))
    assert {tensor.dtype for tensor in adapter_tensors(slimtune, model).values()} == {torch.float32}
    assert predict(randomize(slimtune, model), LLAMA.batch()).dtype == torch.bfloat16


def test_autocast_has_the_same_gradients_as_peft() -> None:
    gradients = []
    for library in (slimtune, peft):
        model: Any = CASES["low-rank"].tuned(library).train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**CASES["low-rank"].batch()).loss
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())
    assert float(gradients[0]) == pytest.approx(float(gradients[1]), rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, found 0"),
        ({"decompose_factor": 0}, "decompose_factor must be a positive whole number, or -1 for any, found 0"),
        ({"decompose_factor": 2.0}, "decompose_factor must be a positive whole number"),
        ({"decompose_both": "yes"}, "decompose_both must be one of True, False, found 'yes'"),
        ({"init_weights": "lycoriss"}, "found 'lycoriss'; did you mean 'lycoris'"),
        ({"rank_dropout": 1.5}, r"rank_dropout must be a number in \[0, 1\)"),
    ],
)
def test_bad_fields_are_refused_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        slimtune.LoKrConfig(**options)


def test_embeddings_are_refused() -> None:
    with pytest.raises(TargetError, match=r"LoKr can't attach to 'model\.embed_tokens', a Embedding"):
        slimtune.get_peft_model(LLAMA.model(), slimtune.LoKrConfig(target_modules=["embed_tokens"]))
