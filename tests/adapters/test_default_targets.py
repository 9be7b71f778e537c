"""Without `target_modules`, the linear layers inside the repeated blocks are found by structure."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForSequenceClassification,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import slimtune
from kinds import NEEDED
from slimtune.adapters.adapter import draft
from slimtune.adapters.targets import resolve
from slimtune.core.config import methods
from slimtune.errors import ConfigError, TargetError, did_you_mean
from tensors import trainable
from zoo import (
    BERT,
    GEMMA3,
    GPT2,
    GPT_NEOX,
    LLAMA,
    LLAMA_LINEARS,
    NEOX_LINEARS,
    QWEN2,
    SPECIMENS,
    T5,
    VIT,
    Specimen,
)  # fmt: skip

EXPECTED: dict[str, tuple[Specimen, list[str]]] = {
    "llama": (LLAMA, LLAMA_LINEARS),
    "qwen2": (QWEN2, LLAMA_LINEARS),
    "gemma3": (GEMMA3, LLAMA_LINEARS),
    "gpt2": (GPT2, ["c_attn", "c_proj", "c_fc"]),
    "gpt-neox": (GPT_NEOX, NEOX_LINEARS),
    "t5": (T5, ["q", "k", "v", "o", "wi", "wo"]),
    "bert": (BERT, ["query", "key", "value", "dense"]),
    "vit": (VIT, ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]),
}


def adapted(model: nn.Module) -> set[str]:
    return {name.partition(".deltas.")[0] for name in trainable(model) if "lora_" in name}


@pytest.mark.parametrize("case", EXPECTED)
def test_all_linear_layers_of_the_blocks_and_no_others(case: str) -> None:
    specimen, names = EXPECTED[case]
    plain = specimen.model()
    types = (nn.Linear, type(GPT2.model().transformer.h[0].attn.c_attn))
    linear = {name for name, module in plain.named_modules() if isinstance(module, types)}
    in_blocks = {name for name in linear if any(part.isdigit() for part in name.split("."))}
    model = slimtune.get_peft_model(plain, slimtune.LoraConfig(r=2))
    assert adapted(model) == in_blocks
    assert {name.rpartition(".")[2] for name in in_blocks} == set(names)


def test_the_config_says_afterwards_what_was_found() -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(r=2))
    assert model.peft_config["default"].target_modules == set(LLAMA_LINEARS)


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
@pytest.mark.parametrize("method", sorted(methods()))
def test_asking_what_a_config_means_leaves_it_untouched(method: str, specimen: Specimen) -> None:
    """Nor does drafting an adapter change it, whether that works or not."""
    config = methods()[method](inference_mode=False, **NEEDED.get(method, {}))
    before = copy.deepcopy(vars(config))
    with contextlib.suppress(TargetError, ConfigError):
        assert resolve(specimen.model(), config).config is not config
        assert vars(config) == before
        draft(specimen.model(), "default", config, True, strict=True)
    assert vars(config) == before


def test_what_a_config_means_is_in_the_answer() -> None:
    config = slimtune.LoraConfig(r=2, trainable_token_indices=[1, 2])
    before = copy.deepcopy(vars(config))
    resolved = resolve(BERT.model(), config).config
    assert vars(config) == before
    assert resolved.modules_to_save == ["classifier"]
    assert {name.rpartition(".")[2] for name in resolved.target_modules} == {"query", "key", "value", "dense"}
    assert resolved.tokens_of == {"bert.embeddings.word_embeddings": [1, 2]}

    whole_weights = slimtune.LoraConfig(r=2, target_parameters=["layers.0.mlp.up_proj.weight"])
    assert resolve(LLAMA.model(), whole_weights).config.parameters_of == {"model.layers.0.mlp.up_proj": ["weight"]}
    assert not whole_weights.parameters_of


def test_a_config_that_was_attached_says_what_it_meant_there() -> None:
    config = slimtune.LoraConfig(r=2)
    model = slimtune.get_peft_model(LLAMA.model(), config)
    assert model.peft_config["default"] is config
    assert config.target_modules == set(LLAMA_LINEARS)


def test_names_that_also_occur_outside_the_blocks_are_saved_so_that_they_mean_the_blocks(tmp_path: Any) -> None:
    """BERT's pooler has a `dense` as its blocks do."""
    model = slimtune.get_peft_model(BERT.model(), slimtune.LoraConfig(r=2))
    assert not any("pooler" in name for name in adapted(model))
    model.save_pretrained(tmp_path)
    reread = slimtune.PeftModel.from_pretrained(BERT.model(), tmp_path, is_trainable=True)
    assert adapted(reread) == adapted(model)


class Stack(nn.Module):
    """Repeated blocks of one's own, between layers that are not repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(3))
        self.exit = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = x + block(x)
        return self.exit(x)


def test_blocks_of_one_s_own() -> None:
    model = slimtune.get_peft_model(Stack(), slimtune.LoraConfig(r=2))
    assert adapted(model) == {f"blocks.{block}.{layer}" for block in range(3) for layer in (0, 2)}


def test_a_model_without_blocks_has_all_its_linear_layers_adapted() -> None:
    model = slimtune.get_peft_model(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), slimtune.LoraConfig(r=2)
    )
    assert adapted(model) == {"0", "2"}


def test_coverage_says_how_many_of_how_many() -> None:
    config = slimtune.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], layers_to_transform=[0])
    model = slimtune.get_peft_model(LLAMA.model(), config)
    coverage = model.coverage()
    assert {name: row[:2] for name, row in coverage.rows.items()} == {"q_proj": (1, 2), "up_proj": (1, 2)}
    assert (coverage.trainable, coverage.total) == model.get_nb_trainable_parameters()
    assert "q_proj" in str(coverage)


def test_suggestions_are_near_or_none() -> None:
    assert "'q_proj'" in did_you_mean("q_porj", LLAMA_LINEARS)
    assert did_you_mean("something else", LLAMA_LINEARS) == ""


def test_chosen_layers_narrow_the_default() -> None:
    config = slimtune.LoraConfig(r=2, layers_to_transform=[1])
    sites = adapted(slimtune.get_peft_model(LLAMA.model(), config))
    assert sites
    assert all(".1." in site for site in sites)


SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def llava() -> Any:
    vision, text = CLIPVisionConfig(**SIZES, image_size=8, patch_size=4), LlamaConfig(**SIZES, vocab_size=64)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=63))


@pytest.mark.parametrize("method", ["LORA", "IA3", "LN_TUNING", "BITFIT", "BOTTLENECK"])
def test_of_a_multimodal_model_the_text_model_alone(method: str) -> None:
    """The vision tower gets no gradient from text, and text is what is trained on."""
    options = {"add_bias": True} if method == "BITFIT" else {}
    model = slimtune.get_peft_model(llava(), methods()[method](**options))
    trained = {name.partition(".deltas.")[0] for name in trainable(model)}
    assert trained
    assert all(name.startswith("model.language_model.") for name in trained)
    assert "only model.language_model is adapted; name others with target_modules" in str(model.coverage())
    ids = torch.arange(8).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert not without


def test_of_a_classifier_on_a_multimodal_model_the_text_model_alone() -> None:
    vision = {**SIZES, "image_size": 8, "patch_size": 4}
    text = {**SIZES, "vocab_size": 64, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=63)
    model = slimtune.get_peft_model(Gemma3ForSequenceClassification(config), slimtune.LoraConfig(r=2))
    assert all(name.startswith(("model.language_model.", "score.")) for name in trainable(model))


def test_both_halves_of_a_model_that_compares_texts_with_images() -> None:
    config = CLIPConfig(
        text_config={**SIZES, "vocab_size": 64}, vision_config={**SIZES, "image_size": 8, "patch_size": 4}
    )
    model = slimtune.get_peft_model(CLIPModel(config), slimtune.LoraConfig(r=2))
    assert {name.split(".")[0] for name in trainable(model)} == {"text_model", "vision_model"}


@pytest.mark.parametrize("targets", [["fc1"], "all-linear", r".*vision_tower.*q_proj"])
def test_of_a_multimodal_model_what_is_named(targets: Any) -> None:
    model = slimtune.get_peft_model(llava(), slimtune.LoraConfig(r=2, target_modules=targets))
    assert any("vision_tower" in name for name in trainable(model))
    assert "only model.language_model" not in str(model.coverage())
