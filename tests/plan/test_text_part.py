"""Models that read pictures or sounds beside texts: their part for texts is planned, the rest is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from slimtune.errors import PlanError
from slimtune.methods.lora.config import LoraConfig
from slimtune.plan.build import config_of
from slimtune.plan.plan import read_config
from slimtune.plan.simulate import simulate
from slimtune.plan.text_part import whole_of

TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
SEES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14}  # fmt: skip
ROTATED = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 4], "rope_theta": 1e4}}


def multimodal(name: str) -> Any:
    text, sees = dict(TEXT), dict(SEES)
    if name == "Mllama":
        text |= {"cross_attention_layers": [1]}
        sees = {"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2,
                "intermediate_size": 64, "vision_output_dim": 64, "image_size": 28}  # fmt: skip
    if name.startswith("Qwen"):
        text |= ROTATED
        sees = {"depth": 1, "hidden_size": 32, "num_heads": 2}
    kind = getattr(transformers, f"{name}Config")
    return kind(text_config=text, vision_config=sees, dtype="bfloat16")


KINDS = ("Gemma3", "Llava", "Qwen2VL", "Qwen2_5_VL", "Mllama", "PaliGemma", "Idefics3", "InternVL", "Mistral3")


@pytest.mark.parametrize("name", KINDS)
def test_the_part_for_texts_is_simulated(name: str) -> None:
    config = multimodal(name)
    plan = simulate(config, LoraConfig(task_type="CAUSAL_LM"), sequence=8, batch=2)
    assert plan.peak_bytes > 0
    assert any(f"a {name}Config is planned for its part for texts" in note for note in plan.notes)
    part = config_of(config)
    assert (part.hidden_size, part.dtype) == (32, torch.bfloat16)
    assert whole_of(config) is None


def test_what_is_loaded_beside_the_part_for_texts_is_counted() -> None:
    config = multimodal("Gemma3")
    whole = transformers.Gemma3ForConditionalGeneration(config)
    own = transformers.Gemma3ForCausalLM(config.get_text_config())
    beside = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in own.parameters())
    method = LoraConfig(task_type="CAUSAL_LM")
    both = simulate(config, method, sequence=8)
    alone = simulate(config.get_text_config(), method, sequence=8, task_type="CAUSAL_LM")
    assert both.peak.parts.weights - alone.peak.parts.weights == 2 * beside > 0
    assert f"{2 * beside / 1e9:.2f} GB of weights, lie beside it" in " ".join(both.notes)


def test_a_model_that_writes_no_text_is_refused() -> None:
    with pytest.raises(PlanError, match="CLIPConfig"):
        read_config(transformers.CLIPConfig())


def test_a_model_of_texts_is_as_it_was() -> None:
    config = transformers.LlamaConfig(**TEXT)
    assert whole_of(config_of(config)) is None
