"""The layout of an adapter on disk, as other engines read it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import slimtune
from tensors import adapter_tensors, randomize
from zoo import BERT, LAYERS, LLAMA, LLAMA_LINEARS, MIXTURE, Specimen

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def saved(folder: Path, specimen: Specimen = LLAMA, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    config = slimtune.LoraConfig(**{"r": 4, **specimen.options(**options)})
    model = randomize(slimtune, slimtune.get_peft_model(specimen.model(), config))
    model.save_pretrained(folder)
    return load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())


def vllm_module(key: str) -> tuple[str, bool]:
    """The module that vLLM assigns a key to, and whether it is A; what it can't parse is an error to it."""
    parts = key.split(".")
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
        return ".".join(parts[:-2]), parts[-2] == "lora_A"
    if parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
        return ".".join(parts[:-1]), parts[-1] == "lora_embedding_A"
    raise ValueError(f"{key} is unsupported LoRA weight")


def vllm_scale(config: dict[str, Any]) -> float:
    """What vLLM multiplies B A with, from the fields that it requires."""
    return config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])


@pytest.mark.parametrize("use_rslora", [False, True])
def test_vllm_can_parse_it(use_rslora: bool, tmp_path: Path) -> None:
    tensors, config = saved(tmp_path, lora_alpha=10, use_rslora=use_rslora)
    modules: dict[str, set[bool]] = {}
    for key in tensors:
        name, is_a = vllm_module(key)
        modules.setdefault(name, set()).add(is_a)
    expected = {
        f"model.layers.{layer}.{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{name}"
        for layer in range(LAYERS)
        for name in LLAMA_LINEARS
    }
    assert set(modules) == expected
    assert all(parts == {True, False} for parts in modules.values())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 10, use_rslora)
    assert sorted(config["target_modules"]) == sorted(LLAMA_LINEARS)
    assert {name.rpartition(".")[2] for name in modules} <= set(config["target_modules"])
    # What vLLM refuses must be at its default.
    assert (config["bias"], config["modules_to_save"], config["use_dora"]) == ("none", None, False)


@pytest.mark.parametrize("targets", [None, "all-linear", r".*\.(q|v)_proj"])
def test_target_modules_are_saved_as_plain_names_or_the_expression(targets: str | None, tmp_path: Path) -> None:
    tensors, config = saved(tmp_path, target_modules=targets)
    written = config["target_modules"]
    modules = {vllm_module(key)[0] for key in tensors}
    if targets in (None, "all-linear"):
        assert sorted(written) == sorted(LLAMA_LINEARS)
        assert all(any(name.endswith(f".{suffix}") for suffix in written) for name in modules)
    else:
        assert written == targets
        assert all(re.fullmatch(written, name) for name in modules)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_engine_that_knows_the_layout_alone_computes_the_same(use_rslora: bool, tmp_path: Path) -> None:
    """B A at vLLM's scale, added by hand to the weights that the keys name."""
    tensors, config = saved(tmp_path, lora_alpha=6, use_rslora=use_rslora)
    model = LLAMA.model()
    with torch.no_grad():
        for key, a in tensors.items():
            name, is_a = vllm_module(key)
            if is_a:
                b = tensors[key.replace("lora_A", "lora_B")]
                model.get_submodule(name).weight.add_(b @ a, alpha=vllm_scale(config))
        expected = model(**LLAMA.batch()).logits
        tuned = slimtune.PeftModel.from_pretrained(LLAMA.model(), tmp_path)
        torch.testing.assert_close(tuned(**LLAMA.batch()).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_is_rank_by_inputs_and_b_outputs_by_rank(tmp_path: Path) -> None:
    tensors, _ = saved(tmp_path)
    layer = "base_model.model.model.layers.0.mlp.down_proj"
    assert tensors[f"{layer}.lora_A.weight"].shape == (4, 48)
    assert tensors[f"{layer}.lora_B.weight"].shape == (32, 4)


def test_heads_are_stored_under_their_own_names(tmp_path: Path) -> None:
    tensors, config = saved(tmp_path, BERT)
    heads = {key for key in tensors if "classifier" in key}
    assert heads == {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert "classifier" in config["modules_to_save"]


def test_a_model_of_one_s_own_says_what_it_is(tmp_path: Path) -> None:
    _, config = saved(tmp_path, MIXTURE)
    assert config["auto_mapping"] == {
        "base_model_class": "Mixture",
        "parent_library": type(MIXTURE.model()).__module__,
    }


def test_the_header_says_pytorch(tmp_path: Path) -> None:
    """transformers and diffusers refuse a file without it."""
    saved(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_the_folder_holds_the_adapter_and_nothing_left_over(tmp_path: Path) -> None:
    saved(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {WEIGHTS, CONFIG, "README.md"}


def test_a_bf16_base_has_a_float32_adapter_on_disk(tmp_path: Path) -> None:
    model = slimtune.get_peft_model(LLAMA.model().to(torch.bfloat16), slimtune.LoraConfig(r=4, **LLAMA.options()))
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
    assert {tensor.dtype for tensor in adapter_tensors(slimtune, model).values()} == {torch.float32}
