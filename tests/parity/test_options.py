"""Each field of `LoraConfig` means to slimtune what it means to peft."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
from torch import nn

import slimtune
from tensors import adapter_tensors, assert_near, assert_same, predict, randomize
from zoo import BERT, GEMMA3, GPT2, GPT_NEOX, LLAMA, LLAMA_LINEARS, MIXTURE, QWEN2, T5, Specimen

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SUFFIXES = {"target_modules": ["q_proj", "v_proj"]}
CASES: dict[str, tuple[Specimen, dict[str, Any]]] = {
    "default-r-and-alpha": (LLAMA, {**SUFFIXES}),
    "alpha": (LLAMA, {**SUFFIXES, "lora_alpha": 3}),
    "rank-1": (LLAMA, {**SUFFIXES, "r": 1}),
    "rslora": (LLAMA, {**SUFFIXES, "r": 6, "use_rslora": True}),
    "rank-pattern": (
        LLAMA,
        {"target_modules": LLAMA_LINEARS, "r": 4, "rank_pattern": {"q_proj": 2, "mlp.up_proj": 7}},
    ),
    "rank-pattern-regex": (
        LLAMA,
        {"target_modules": LLAMA_LINEARS, "rank_pattern": {r".*layers\.1\..*_proj": 3}},
    ),
    "rank-pattern-anchored": (LLAMA, {**SUFFIXES, "rank_pattern": {"^model.layers.0.self_attn.q_proj": 3}}),
    "alpha-pattern": (
        LLAMA,
        {"target_modules": LLAMA_LINEARS, "alpha_pattern": {"q_proj": 2, "up_proj": 33}},
    ),
    "both-patterns-and-rslora": (
        LLAMA,
        {**SUFFIXES, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True},
    ),
    "one-layer": (LLAMA, {**SUFFIXES, "layers_to_transform": 1}),
    "layers": (LLAMA, {**SUFFIXES, "layers_to_transform": [0]}),
    "layers-pattern": (
        GPT2,
        {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"},
    ),
    "layers-patterns": (LLAMA, {**SUFFIXES, "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}),
    "exclude-names": (LLAMA, {"target_modules": LLAMA_LINEARS, "exclude_modules": ["q_proj", "down_proj"]}),
    "exclude-path": (LLAMA, {**SUFFIXES, "exclude_modules": ["model.layers.0.self_attn.q_proj"]}),
    "exclude-regex": (LLAMA, {"target_modules": LLAMA_LINEARS, "exclude_modules": r".*\.0\.mlp\..*"}),
    "regex": (LLAMA, {"target_modules": r".*\.(0\.self_attn|1\.mlp)\.\w+_proj"}),
    "full-path": (LLAMA, {"target_modules": ["model.layers.1.mlp.up_proj"]}),
    "longer-suffix": (LLAMA, {"target_modules": ["self_attn.q_proj"]}),
    "all-linear": (LLAMA, {"target_modules": "all-linear"}),
    "all-linear-in-capitals": (LLAMA, {"target_modules": "ALL-LINEAR"}),
    "all-linear-conv1d": (GPT2, {"target_modules": "all-linear"}),
    "all-linear-fused": (GPT_NEOX, {"target_modules": "all-linear"}),
    "all-linear-classifier": (BERT, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "all-linear-encoder-decoder": (T5, {"target_modules": "all-linear"}),
    "all-linear-own-module": (MIXTURE, {"target_modules": "all-linear", "r": 4}),
    "output-head": (LLAMA, {"target_modules": ["lm_head", "q_proj"]}),
    "embedding": (LLAMA, {"target_modules": ["embed_tokens"]}),
    "scaled-embedding": (GEMMA3, {"target_modules": ["embed_tokens"]}),
    "bias-all": (QWEN2, {**SUFFIXES, "bias": "all"}),
    "bias-lora-only": (QWEN2, {**SUFFIXES, "bias": "lora_only"}),
    "bias-all-conv1d": (GPT2, {"target_modules": ["c_attn"], "bias": "all"}),
    "bias-all-convolutions": (MIXTURE, {"target_modules": ["conv2d", "grouped", "shared"], "bias": "all"}),
    "modules-to-save-linear": (LLAMA, {**SUFFIXES, "modules_to_save": ["lm_head"]}),
    "modules-to-save-embedding": (LLAMA, {**SUFFIXES, "modules_to_save": ["embed_tokens"]}),
    "modules-to-save-norm": (LLAMA, {**SUFFIXES, "modules_to_save": ["input_layernorm"]}),
    "modules-to-save-subtree": (LLAMA, {**SUFFIXES, "modules_to_save": ["mlp"]}),
    "task-type": (LLAMA, {**SUFFIXES, "task_type": "CAUSAL_LM"}),
    "task-type-keeps-the-head": (BERT, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "fan-in-fan-out-unsaid": (GPT2, {"target_modules": ["c_attn"]}),
}


def attach(library: ModuleType, specimen: Specimen, options: dict[str, Any]) -> nn.Module:
    model = library.get_peft_model(specimen.model(), library.LoraConfig(**copy.deepcopy(options)))
    return randomize(library, model)


@pytest.mark.parametrize("case", CASES)
def test_an_option_means_the_same(case: str, tmp_path: Path) -> None:
    specimen, options = CASES[case]
    ours, theirs = attach(slimtune, specimen, options), attach(peft, specimen, options)
    assert_same(adapter_tensors(slimtune, ours), adapter_tensors(peft, theirs))
    expected = predict(theirs, specimen.batch())
    assert_near(predict(ours, specimen.batch()), expected)

    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    reread_by_peft = peft.PeftModel.from_pretrained(specimen.model(), tmp_path / "ours")
    reread_by_us = slimtune.PeftModel.from_pretrained(specimen.model(), tmp_path / "theirs")
    assert_near(predict(reread_by_peft, specimen.batch()), expected)
    assert_near(predict(reread_by_us, specimen.batch()), expected)


@pytest.mark.parametrize("case", CASES)
def test_the_same_parameters_train(case: str) -> None:
    specimen, options = CASES[case]
    trained = []
    for library in (slimtune, peft):
        model = library.get_peft_model(specimen.model(), library.LoraConfig(**copy.deepcopy(options)))
        trained.append(model.get_nb_trainable_parameters()[0])
    assert trained[0] == trained[1]


def test_dropout_is_off_in_evaluation_and_scales_in_training() -> None:
    options = {**LLAMA.options(), "lora_dropout": 0.5}
    ours, theirs = attach(slimtune, LLAMA, options), attach(peft, LLAMA, options)
    expected = predict(theirs, LLAMA.batch())
    assert_near(predict(ours, LLAMA.batch()), expected)
    assert (predict_in_training(ours) - expected).abs().max() > 1e-3


def predict_in_training(model: nn.Module) -> Any:
    batch = LLAMA.batch()
    del batch["labels"]
    return model.train()(**batch).logits
