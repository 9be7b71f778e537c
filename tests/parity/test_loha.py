"""LoHa is what it is in peft, and its formula is the paper's."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimtune
from beside_peft import Agreement, Case, check_generation
from slimtune.errors import ConfigError, TargetError
from tensors import adapter_tensors, assert_near, predict, randomize, trainable
from zoo import BERT, GPT2, LLAMA, LLAMA_LINEARS, MIXTURE, T5

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LINEARS = {"target_modules": LLAMA_LINEARS, "r": 4}
CONVOLUTIONS = {"target_modules": ["conv1d", "conv2d", "grouped", "shared", "out"], "r": 3}
CASES = {
    "defaults": Case("LoHaConfig", LLAMA, {"target_modules": LLAMA_LINEARS}),
    "alpha": Case("LoHaConfig", LLAMA, {**LINEARS, "alpha": 3}),
    "patterns": Case(
        "LoHaConfig",
        LLAMA,
        {**LINEARS, "rank_pattern": {"q_proj": 2, "mlp.up_proj": 7}, "alpha_pattern": {r".*\.1\..*v_proj": 5}},
    ),
    "layers": Case("LoHaConfig", LLAMA, {**LINEARS, "layers_to_transform": [1], "exclude_modules": ["q_proj"]}),
    "convolutions": Case("LoHaConfig", MIXTURE, CONVOLUTIONS),
    "effective-convolutions": Case("LoHaConfig", MIXTURE, {**CONVOLUTIONS, "use_effective_conv2d": True}),
    "classifier": Case("LoHaConfig", BERT, {"target_modules": ["query", "value"], "r": 4, "task_type": "SEQ_CLS"}),
    "encoder-decoder": Case("LoHaConfig", T5, {"target_modules": ["q", "wo"], "r": 4}),
}


class TestAgreement(Agreement):
    cases = CASES
    # peft 0.21 multiplies the gradients of one half's core and factors by those of the other half.
    trained = {name: case for name, case in CASES.items() if name != "effective-convolutions"}


def test_generation_agrees() -> None:
    check_generation("LoHaConfig", **LINEARS)


@pytest.mark.parametrize("name", ["defaults", "convolutions"])
def test_dropped_modules_and_outputs_are_those_of_peft_with_the_same_seed(name: str) -> None:
    case = CASES[name]
    case = Case("LoHaConfig", case.specimen, {**case.options, "rank_dropout": 0.4, "module_dropout": 0.3})
    outputs = []
    for library in (slimtune, peft):
        model = case.tuned(library).train()
        torch.manual_seed(5)
        output = model(**{key: value for key, value in case.batch().items() if key != "labels"})
        outputs.append(output if isinstance(output, Tensor) else output.logits)
    assert_near(*outputs)
    assert (outputs[0] - predict(case.tuned(slimtune), case.batch())).abs().max() > 1e-3


def test_an_adapter_starts_at_the_base_and_without_init_weights_elsewhere() -> None:
    base = predict(LLAMA.model(), LLAMA.batch())
    for init, starts_at_base in ((True, True), (False, False)):
        model = Case("LoHaConfig", LLAMA, {**LINEARS, "init_weights": init}).model(slimtune)
        assert torch.equal(predict(model, LLAMA.batch()), base) == starts_at_base


def test_the_formula() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 9)).double()
    config = slimtune.LoHaConfig(r=2, alpha=3, target_modules=["0"])
    model = randomize(slimtune, slimtune.get_peft_model(base, config))
    t = {key.rpartition("hada_")[2]: tensor for key, tensor in adapter_tensors(slimtune, model).items()}
    update = 3 / 2 * (t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"])
    assert torch.linalg.matrix_rank(update) == 4, "the square of the rank"
    x = torch.randn(5, 6, dtype=torch.float64)
    assert_near(model(x), F.linear(x, model.get_parameter("0.weight") + update, model.get_parameter("0.bias")), 1e-12)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "module", [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (3, 2)), nn.Conv2d(4, 6, 3, groups=2)], ids=repr
)
@pytest.mark.parametrize("effective", [True, False])
def test_gradients_of_convolutions_are_those_of_finite_differences(module: Any, effective: bool) -> None:
    config = slimtune.LoHaConfig(r=2, target_modules=["0"], use_effective_conv2d=effective)
    model = slimtune.get_peft_model(nn.Sequential(copy.deepcopy(module)), config)
    model = randomize(slimtune, model).double()
    x = torch.randn(2, 4, *[5] * len(module.kernel_size), dtype=torch.float64, requires_grad=True)
    factors = trainable(model)

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(factors, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *factors.values()))


def test_gpt2_s_conv1d_is_a_linear_layer() -> None:
    model: Any = randomize(
        slimtune, slimtune.get_peft_model(GPT2.model(), slimtune.LoHaConfig(target_modules=["c_attn"]))
    )
    expected = predict(model, GPT2.batch())
    assert_near(predict(model.merge_and_unload(), GPT2.batch()), expected)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_a_small_update_of_a_16_bit_layer_is_not_lost_in_its_weight(autocast_adapter_dtype: bool) -> None:
    layer = nn.Linear(64, 64, bias=False)
    nn.init.ones_(layer.weight)
    config = slimtune.LoHaConfig(r=1, alpha=1, target_modules=["0"])
    host = nn.Sequential(layer).bfloat16()
    model: Any = slimtune.get_peft_model(host, config, autocast_adapter_dtype=autocast_adapter_dtype)
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    ones = {key: torch.ones_like(tensor) for key, tensor in adapter_tensors(slimtune, model).items()}
    # 1 + 2^-12 is no number of 16 bits.
    update = {key: 2.0**-12 * signs[None] if "w1_b" in key else tensor for key, tensor in ones.items()}
    slimtune.set_peft_model_state_dict(model, update)
    x = signs[None].bfloat16().requires_grad_()
    y = model(x)
    assert torch.equal(y.detach(), torch.full((1, 64), 2.0**-6, dtype=torch.bfloat16))
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in trainable(model).values())


def test_a_16_bit_base_keeps_its_dtype_with_a_float32_adapter() -> None:
    model = slimtune.get_peft_model(LLAMA.model().bfloat16(), slimtune.LoHaConfig(**LINEARS))
    assert {tensor.dtype for tensor in adapter_tensors(slimtune, model).values()} == {torch.float32}
    assert predict(randomize(slimtune, model), LLAMA.batch()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, found 0"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj must be a whole number"),
        ({"alpha": "8"}, "alpha must be a number, found '8'"),
        ({"alpha_pattern": {"q_proj": None}}, "q_proj must be a number"),
        ({"rank_dropout": 1}, r"rank_dropout must be a number in \[0, 1\)"),
        ({"module_dropout": -0.1}, r"module_dropout must be a number in \[0, 1\)"),
        ({"use_effective_conv2d": "yes"}, "use_effective_conv2d must be one of True, False"),
        ({"init_weights": "lycoris"}, "init_weights must be one of True, False, found 'lycoris'"),
        ({"lora_alpha": 4}, "has no field 'lora_alpha'; did you mean"),
    ],
)
def test_bad_fields_are_refused_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        slimtune.LoHaConfig(**options)


def test_embeddings_are_refused() -> None:
    with pytest.raises(TargetError, match=r"LoHa can't attach to 'model\.embed_tokens', a Embedding"):
        slimtune.get_peft_model(LLAMA.model(), slimtune.LoHaConfig(target_modules=["embed_tokens"]))


def test_a_pattern_that_names_nothing_is_refused() -> None:
    with pytest.raises(TargetError, match=r"rank_pattern names 'q_prj'.*did you mean 'q_proj'"):
        slimtune.get_peft_model(LLAMA.model(), slimtune.LoHaConfig(**LINEARS, rank_pattern={"q_prj": 2}))
