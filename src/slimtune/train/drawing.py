"""Answers that a model in training draws to prompts, for rewards: by the engine where it can run the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from slimtune.engine.engine import Engine
from slimtune.engine.request import Request, SamplingParams
from slimtune.errors import ConfigError, DoesNotFitError

AT_ONCE = 32
"""Answers that are written at the same time."""


def draw(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], most: int, **sampling: Any
) -> list[list[int]] | None:
    """An answer to each prompt, as tokens, the one that ends it included; None for a model that no engine runs.

    Equal prompts are read once, and the factors of an adapter are multiplied beside the frozen weights. Nothing is
    dropped out meanwhile. What is drawn follows from torch's generator.

    Args:
        model: with one adapter active, or with none.
        most: tokens of an answer.
        sampling: as `SamplingParams` has it.

    Raises:
        SlimtuneError: an answer failed, with what went wrong.
    """
    active = list(model.active_adapters) if getattr(model, "peft_config", None) else []
    if len(active) > 1:
        return None
    adapter = active[0] if active else None
    virtual = getattr(model.peft_config[adapter], "num_virtual_tokens", None) or 0 if adapter else 0
    context = virtual + max(map(len, prompts)) + most + 1
    was_training = model.training
    try:
        try:
            params = SamplingParams(max_tokens=most, **sampling)
            engine = Engine(model, tokenizer, slots=min(AT_ONCE, len(prompts)), context=context)
        except (ConfigError, DoesNotFitError):
            return None
        # One for each answer, so that none depends on what is drawn beside it.
        seeds = torch.randint(2**62, (len(prompts),)).tolist()
        requests = [
            Request(tuple(prompt), replace(params, seed=seed), adapter)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return [list(answer.tokens) for answer in engine.generate(requests)]
    finally:
        model.train(was_training)
