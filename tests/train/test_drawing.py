"""Answers that a model in training draws: what the model itself would, by the engine, and the model is as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import slimtune
from slimtune.train.drawing import draw
from small_seq2seq import t5
from small_text_model import tiny_model, tiny_tokenizer
from tensors import randomize

TOKENIZER = tiny_tokenizer()
PROMPTS = [[5, 9, 30, 7], [11] * 9, [5, 9, 30, 7], [40, 41, 42]]
CONFIGS = {
    "full": None,
    "lora": slimtune.LoraConfig(r=4, lora_dropout=0.5),
    "dora": slimtune.LoraConfig(r=4, use_dora=True, target_modules="all-linear"),
    "ia3": slimtune.IA3Config(),
    "bitfit": slimtune.BitFitConfig(add_bias=True),
    "prompt": slimtune.PromptTuningConfig(num_virtual_tokens=3),
    "prefix": slimtune.PrefixTuningConfig(num_virtual_tokens=3),
}


def trained(config: Any) -> Any:
    model: Any = tiny_model()
    if config is not None:
        model = randomize(slimtune, slimtune.get_peft_model(model, config))
    return model.train()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_likeliest_answers_are_those_of_the_model(config: Any) -> None:
    model = trained(config)
    attention, parameters = model.config._attn_implementation, dict(model.named_parameters())
    drawn = draw(model, TOKENIZER, PROMPTS, 6, temperature=0.0)
    assert model.training
    assert model.config._attn_implementation == attention
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert not any(parameter.is_inference() for parameter in model.parameters())
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        produced = model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        expected.append(produced[0, len(prompt) :].tolist())
    assert drawn == expected


def test_what_is_drawn_follows_from_torchs_generator() -> None:
    model, found = trained(None), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(draw(model, TOKENIZER, [PROMPTS[0]] * 6, 5, temperature=1.0, top_p=0.9))
    assert found[0] == found[1] != found[2]
    assert len({tuple(answer) for answer in found[0] or ()}) > 1, "answers to one prompt differ"


def test_a_model_that_no_engine_runs_is_left_to_others() -> None:
    model = t5().train()
    assert draw(model, TOKENIZER, PROMPTS, 4) is None
    assert model.training
    two = trained(CONFIGS["lora"])
    two.add_adapter("other", CONFIGS["lora"])
    two.base_model.set_adapter(["default", "other"])
    assert draw(two, TOKENIZER, PROMPTS, 4) is None
