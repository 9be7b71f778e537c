"""Each answer is what its adapter alone gives, for every method on every base, whatever runs beside it."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch

import slimtune
from kinds import NEEDED
from slimtune.core.config import methods
from slimtune.engine.engine import Engine
from slimtune.engine.request import Request, SamplingParams
from slimtune.errors import ConfigError, TargetError
from tensors import randomize
from zoo import GEMMA3, GPT2, GPT_NEOX, LLAMA, QUANTIZED, QWEN2, TIED_LLAMA, Specimen, token_ids, word_tokenizer

TOKENS = 6
SPECIMENS = {specimen.name: specimen for specimen in (LLAMA, TIED_LLAMA, QWEN2, GPT2, GPT_NEOX, GEMMA3, *QUANTIZED)}
EXTRA: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "biases": {"bias": "all", "target_modules": ["q_proj"]},
    "head": {"modules_to_save": ["lm_head"]},
    "pissa": {"init_lora_weights": "pissa"},
    "embedding": {"target_modules": ["embed_tokens"]},
}
"""Forms of LoRA that run otherwise than the plain one."""


def configs(specimen: Specimen) -> dict[str, Any]:
    """Every method as it is without a word, and forms of LoRA."""
    found = {name: methods()[name](inference_mode=False, **NEEDED.get(name, {})) for name in sorted(methods())}
    found |= {"parallel": slimtune.BottleneckConfig(placement="parallel")}
    return found | {name: slimtune.LoraConfig(**options) for name, options in EXTRA.items()}


def with_all_methods(specimen: Specimen) -> tuple[Any, list[str]]:
    """A model with an adapter of each method that attaches to it."""
    model: Any = specimen.model()
    names = []
    for seed, (name, config) in enumerate(configs(specimen).items()):
        try:
            slimtune.get_peft_model(model, config, name) if not names else model.add_adapter(name, config)
        except (TargetError, ConfigError):
            continue
        torch.manual_seed(seed)
        randomize(slimtune, model, name, seed)
        names.append(name)
    return model.eval(), names


@functools.cache
def prompts() -> tuple[tuple[int, ...], ...]:
    torch.manual_seed(5)
    return tuple(tuple(token_ids(1, length)[0].tolist()) for length in (3, 1, 11, 7))


@torch.no_grad()
def greedy_alone(model: Any, name: str | None, prompt: tuple[int, ...], answer: tuple[int, ...]) -> tuple[int, ...]:
    """What the model under one adapter, run by itself, finds most likely before each token of an answer."""
    if name is not None:
        model.set_adapter(name)
    with contextlib.nullcontext() if name is not None else model.disable_adapter():
        logits_TV = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
    return tuple(logits_TV[-len(answer) - 1 : -1].argmax(-1).tolist())


def asked(name: str | None, prompt: tuple[int, ...], **options: Any) -> Request:
    return Request(prompt, SamplingParams(**{"max_tokens": TOKENS, "temperature": 0, **options}), name)


@pytest.mark.parametrize("is_started", [True, False])
@pytest.mark.parametrize("specimen", SPECIMENS.values(), ids=lambda specimen: specimen.name)
def test_each_answer_is_its_adapters_alone(specimen: Specimen, is_started: bool) -> None:
    model, names = with_all_methods(specimen)
    cases = [(name, prompts()[index % len(prompts())]) for index, name in enumerate([None, *names, None])]
    engine = Engine(model, word_tokenizer(), slots=5, context=48, prefill_chunk=8)
    if is_started:
        # With the weights in another order, as in a server.
        engine.start()
    completions = engine.generate([asked(name, prompt) for name, prompt in cases])
    engine.stop()
    answers = [completion.tokens for completion in completions]
    alone = [greedy_alone(model, *case, answer) for case, answer in zip(cases, answers, strict=True)]
    wrong = {case[0]: (a, b) for case, a, b in zip(cases, answers, alone, strict=True) if a != b}
    assert wrong == {}
    assert len(names) >= 10
    # The adapters differ, so that a row under another one's would show.
    assert len(set(answers)) >= 8
