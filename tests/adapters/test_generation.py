"""`generate` and pipelines work on an adopted model as on a plain one, and say what peft says."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import peft
import pytest
import torch
import transformers

import slimtune
from tensors import randomize
from zoo import BERT, GPT2, LLAMA, T5, TIED_LLAMA, Specimen, word_tokenizer

GENERATORS = [LLAMA, TIED_LLAMA, GPT2, T5]
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "without-cache": {"do_sample": False, "use_cache": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "several": {"do_sample": True, "num_return_sequences": 3},
}


def tuned(library: ModuleType, specimen: Specimen) -> Any:
    config = library.LoraConfig(r=4, lora_alpha=16, **specimen.options())
    return randomize(library, library.get_peft_model(specimen.model(), config)).eval()


def generate(model: Any, **strategy: Any) -> torch.Tensor:
    ids = LLAMA.batch()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # padding on the left
    torch.manual_seed(3)
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=9, min_new_tokens=9, **strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("specimen", GENERATORS, ids=lambda specimen: specimen.name)
def test_tokens_are_peft_s(specimen: Specimen, strategy: str) -> None:
    ours, theirs = (generate(tuned(library, specimen), **STRATEGIES[strategy]) for library in (slimtune, peft))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("specimen", GENERATORS, ids=lambda specimen: specimen.name)
def test_the_base_says_something_else_and_comes_back_when_disabled(specimen: Specimen) -> None:
    sampling = STRATEGIES["sampling"]
    base = generate(specimen.model(), **sampling)
    model = tuned(slimtune, specimen)
    assert not torch.equal(generate(model, **sampling), base)
    with model.disable_adapter():
        assert torch.equal(generate(model, **sampling), base)
    assert torch.equal(generate(model.unload(), **sampling), base)


def test_the_text_generation_pipeline() -> None:
    prompts = ["w5 w6 w7", "w9 w8"]
    texts = []
    for library in (slimtune, peft):
        pipeline = transformers.pipeline(
            "text-generation", model=tuned(library, LLAMA), tokenizer=word_tokenizer(), device="cpu"
        )
        texts.append([out[0]["generated_text"] for out in pipeline(prompts, max_new_tokens=6, do_sample=False)])
    assert texts[0] == texts[1]
    assert all(len(text.split()) > 5 for text in texts[0])


def test_the_classification_pipeline() -> None:
    scores = []
    for library in (slimtune, peft):
        model = tuned(library, BERT)
        pipeline = transformers.pipeline("text-classification", model=model, tokenizer=word_tokenizer(), device="cpu")
        scores.append([round(out["score"], 5) for out in pipeline(["w5 w6 w7", "w9 w8 w4"], top_k=None)[0]])
    assert scores[0] == scores[1]


def test_generation_config_and_checks_are_the_model_s_own() -> None:
    model = tuned(slimtune, LLAMA)
    model.generation_config.max_new_tokens = 3
    out = model.generate(input_ids=torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 2), do_sample=False)
    assert out.shape[1] <= 5
    with pytest.raises(ValueError, match="max_new_tokenz"):
        model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokenz=3)
