"""What a user can get wrong: a clear sentence, before anything has changed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import slimtune
from slimtune.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    ConfigError,
    MergeError,
    SlimtuneError,
    TargetError,
)
from tensors import assert_near, predict, randomize
from zoo import BERT, GPT2, LLAMA, MIXTURE, Specimen


def refused(specimen: Specimen, **options: Any) -> str:
    """The sentence on attaching; the model has no trace of the attempt."""
    model = specimen.model()
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(SlimtuneError) as caught:
        slimtune.get_peft_model(model, slimtune.LoraConfig(**options))
    assert isinstance(caught.value, ValueError), "as code written for peft expects"
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert [type(module) for module in model.modules()] == classes
    return str(caught.value)


TARGETS: dict[str, tuple[Specimen, dict[str, Any], list[str]]] = {
    "a-typo": (LLAMA, {"target_modules": ["q_porj"]}, ["q_porj", "did you mean", "q_proj"]),
    "one-typo-among-three": (LLAMA, {"target_modules": ["q_proj", "v_proj", "o_porj"]}, ["o_porj", "o_proj"]),
    "another-architecture": (GPT2, {"target_modules": ["q_proj"]}, ["q_proj", "did you mean", "c_proj"]),
    "a-regex": (
        LLAMA,
        {"target_modules": r"layers\.\d+\.q_proj"},
        ["matches no module", "model.layers.0.self_attn.q_proj"],
    ),
    "nothing-left": (LLAMA, {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, ["q_proj"]),
    "an-exclusion": (LLAMA, {"target_modules": ["q_proj"], "exclude_modules": ["k_porj"]}, ["k_porj"]),
    "a-head": (LLAMA, {"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, ["lm_haed", "lm_head"]),
    "a-layer": (LLAMA, {"target_modules": ["q_proj"], "layers_to_transform": [1, 9]}, ["9"]),
    "a-rank-pattern": (
        LLAMA,
        {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}},
        ["rank_pattern", "v_proj"],
    ),
    "an-alpha-pattern": (
        LLAMA,
        {"target_modules": ["q_proj"], "alpha_pattern": {"q_porj": 2}},
        ["alpha_pattern", "q_porj", "q_proj"],
    ),
    "in-two-places": (LLAMA, {"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]}, ["leave it out of one"]),
    "an-empty-list": (LLAMA, {"target_modules": []}, ["target_modules"]),
    "a-norm": (LLAMA, {"target_modules": ["input_layernorm"]}, ["input_layernorm"]),
    "a-container": (LLAMA, {"target_modules": ["self_attn"]}, ["self_attn"]),
    "a-layernorm-by-regex": (BERT, {"target_modules": r".*LayerNorm"}, ["LayerNorm"]),
}


@pytest.mark.parametrize("case", TARGETS)
def test_a_pattern_that_matches_nothing_usable(case: str) -> None:
    specimen, options, words = TARGETS[case]
    message = refused(specimen, **options)
    assert [word for word in words if word not in message] == []


def test_no_linear_layer_at_all() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.ReLU())
    with pytest.raises(TargetError, match=r"there are numbers alone$"):
        slimtune.get_peft_model(model, slimtune.LoraConfig())


def test_a_rank_that_the_groups_of_a_convolution_do_not_divide() -> None:
    message = refused(MIXTURE, target_modules=["grouped"], r=6)
    assert [word for word in ("6", "grouped", "4") if word not in message] == []


RANKS: dict[str, tuple[Specimen, dict[str, Any], str]] = {
    "beyond-the-matrix": (LLAMA, {"target_modules": ["q_proj"], "r": 33}, "rank 33 is beyond a 32 x 32 matrix"),
    "beyond-the-smallest": (LLAMA, {"target_modules": ["q_proj", "k_proj"], "r": 20}, "rank 20 is beyond a 16 x 32"),
    "by-pattern": (LLAMA, {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 64}}, "rank 64 is beyond a 32"),
    "with-dora": (LLAMA, {"target_modules": ["k_proj"], "r": 20, "use_dora": True}, "rank 20 is beyond a 16 x 32"),
    "in-a-convolution": (MIXTURE, {"target_modules": ["conv2d"], "r": 9}, "rank 9 is beyond a"),
    "in-an-embedding": (LLAMA, {"target_modules": ["embed_tokens"], "r": 33}, "rank 33 is beyond a"),
}


@pytest.mark.parametrize("case", RANKS)
def test_a_rank_that_the_matrix_cannot_have_is_said_when_it_is_chosen_and_read_in_silence(
    case: str, tmp_path: Path
) -> None:
    specimen, options, words = RANKS[case]
    with pytest.warns(UserWarning, match=words):
        model = slimtune.get_peft_model(specimen.model(), slimtune.LoraConfig(**options))
    expected = predict(randomize(slimtune, model).eval(), specimen.batch())
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = slimtune.PeftModel.from_pretrained(specimen.model(), tmp_path)
    assert torch.equal(predict(ours, specimen.batch()), expected)
    theirs = peft.PeftModel.from_pretrained(specimen.model(), tmp_path)
    assert_near(predict(theirs, specimen.batch()), expected)
    assert_near(predict(ours.merge_and_unload(), specimen.batch()), expected, 1e-4)


def test_the_greatest_rank_is_chosen_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(r=16, target_modules=["k_proj"]))
    assert [warning for warning in recwarn if "rank" in str(warning.message)] == []
    assert model.get_nb_trainable_parameters()[0] == 2 * (16 * 32 + 16 * 16)


CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "typo-in-a-field": ({"lora_aplha": 16}, ["lora_aplha", "lora_alpha"]),
    "field-of-nothing": ({"learning_rate": 1e-4}, ["learning_rate"]),
    "rank-zero": ({"r": 0}, ["r", "0"]),
    "rank-negative": ({"r": -4}, ["-4"]),
    "rank-fraction": ({"r": 2.5}, ["2.5"]),
    "rank-text": ({"r": "8"}, ["'8'"]),
    "rank-true": ({"r": True}, ["True"]),
    "rank-in-pattern": ({"rank_pattern": {"q_proj": 0}}, ["q_proj", "0"]),
    "dropout-one": ({"lora_dropout": 1.0}, ["lora_dropout", "1.0"]),
    "dropout-negative": ({"lora_dropout": -0.1}, ["lora_dropout", "-0.1"]),
    "alpha-text": ({"lora_alpha": "16"}, ["lora_alpha", "16"]),
    "bias": ({"bias": "lora-only"}, ["lora-only", "lora_only"]),
    "task-type": ({"task_type": "CAUSAL_ML"}, ["CAUSAL_ML", "CAUSAL_LM"]),
    "initialisation": ({"init_lora_weights": "gausian"}, ["gausian", "gaussian"]),
    "layers-with-a-regex": ({"target_modules": ".*q", "layers_to_transform": [0]}, ["layers_to_transform"]),
    "pattern-without-layers": ({"target_modules": ["q"], "layers_pattern": "h"}, ["layers_to_transform"]),
    "qalora": ({"use_qalora": True}, ["use_qalora"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_cannot_be(case: str) -> None:
    options, words = CONFIGS[case]
    with pytest.raises(ConfigError) as caught:
        slimtune.LoraConfig(**options)
    assert isinstance(caught.value, ValueError)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.fixture
def model() -> Any:
    return slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(r=4, **LLAMA.options()), "formal")


def test_two_adapters_of_one_name(model: Any) -> None:
    before = predict(model, LLAMA.batch())
    with pytest.raises(AdapterExistsError, match="formal"):
        model.add_adapter("formal", slimtune.LoraConfig(r=2, target_modules=["up_proj"]))
    assert list(model.peft_config) == ["formal"]
    assert torch.equal(predict(model, LLAMA.batch()), before)


def test_attaching_twice_adds_a_second_adapter_and_no_second_wrapper(model: Any) -> None:
    again = slimtune.get_peft_model(model, slimtune.LoraConfig(r=2, target_modules=["up_proj"]), "casual")
    assert again is model
    assert list(model.peft_config) == ["formal", "casual"]
    assert type(model.unload()) is type(LLAMA.model())


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.set_adapter("fromal"),
        lambda model: model.set_adapter(["formal", "fromal"]),
        lambda model: model.delete_adapter("fromal"),
        lambda model: model.merge_adapter(["fromal"]),
        lambda model: model.merge_and_unload(adapter_names=["fromal"]),
        lambda model: model.add_weighted_adapter(["formal", "fromal"], [1, 1], "new"),
        lambda model: model.save_pretrained("/nonexistent", selected_adapters=["fromal"]),
        lambda model: slimtune.get_peft_model_state_dict(model, adapter_name="fromal"),
        lambda model: slimtune.set_peft_model_state_dict(model, {}, adapter_name="fromal"),
        lambda model: model.eval()(input_ids=torch.tensor([[5]]), adapter_names=["fromal"]),
    ],
)
def test_an_adapter_that_is_not_there(model: Any, call: Any) -> None:
    with pytest.raises(AdapterNotFoundError, match="did you mean 'formal'") as caught:
        call(model)
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, ValueError)
    assert not str(caught.value).startswith('"'), "a KeyError would show its repr"
    assert model.active_adapters == ["formal"]
    assert list(model.peft_config) == ["formal"]


def test_a_combination_that_cannot_be(model: Any) -> None:
    model.add_adapter("small", slimtune.LoraConfig(r=2, **LLAMA.options()))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"weights": [1.0]}, "weight"),
        ({"combination_type": "lineal"}, "linear"),
        ({"combination_type": "linear"}, "rank"),
        ({"adapter_name": "formal"}, "formal"),
    ]
    for options, word in cases:
        arguments = {"adapters": ["formal", "small"], "weights": [1.0, 1.0], "adapter_name": "new", **options}
        with pytest.raises(ValueError, match=word):
            model.add_weighted_adapter(**arguments)
        assert list(model.peft_config) == ["formal", "small"]


def test_deleting_a_merged_adapter(model: Any) -> None:
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge"):
        model.delete_adapter("formal")


def test_rows_of_adapters_in_training(model: Any) -> None:
    with pytest.raises(ValueError, match="eval"):
        model.train()(**LLAMA.batch(), adapter_names=["formal", "formal"])


def test_what_is_not_a_model() -> None:
    with pytest.raises(SlimtuneError, match="str"):
        slimtune.get_peft_model("meta-llama/Llama-3", slimtune.LoraConfig())


@pytest.mark.parametrize("given", [("meta-llama/Llama-3", "an/adapter"), (LLAMA.model(), None)])
def test_a_base_and_an_adapter_are_loaded_together_or_not_at_all(given: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match=r"takes the base model and then the adapter, found .* use AutoPeftModel"):
        slimtune.PeftModel.from_pretrained(*given)


def test_a_module_that_is_read_but_never_called() -> None:
    """torch's attention takes the weight of its out_proj: a delta there would train nothing, silently."""
    model = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(TargetError, match="out_proj"):
        slimtune.get_peft_model(model, slimtune.LoraConfig(r=2, target_modules=["out_proj"]))
    by_default = slimtune.get_peft_model(model, slimtune.LoraConfig(r=2, target_modules="all-linear"))
    assert by_default.peft_config["default"].target_modules == {"linear1", "linear2"}
