"""Answers to many prompts at once: what they all begin with is read once, the rest in batches of similar length."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from slimtune.errors import ConfigError


def sampling(temperature: float) -> dict[str, Any]:
    """The arguments of `generate` for a temperature, 0 being greedy; raises ConfigError below 0."""
    if temperature < 0:
        raise ConfigError(f"temperature must not be negative, but is {temperature}; pass 0 for greedy decoding")
    if temperature == 0:
        # Named one by one, because a model's generation_config may set them and then warns.
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature}


def pad_id_of(tokenizer: Any) -> int:
    """The id to pad with; the attention mask hides it, so the end of turn will do."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


@torch.inference_mode()
def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """The answers to rendered prompts, in their order; raises ConfigError for a negative temperature.

    `on_batch` is told how many answers each batch brought.
    """
    was_training = model.training
    model.eval()
    rows = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    prefix, cache = _read_shared_prefix(model, rows)
    pad_id = pad_id_of(tokenizer)
    answers = [""] * len(rows)
    for start in range(0, len(rows), batch_size):
        chosen = by_length[start : start + batch_size]
        ids, mask = _pad_behind(prefix, [rows[index][len(prefix) :] for index in chosen], pad_id, model.device)
        produced = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=_repeated(cache, len(chosen)),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_id,
            **sampling(temperature),
        )
        texts = tokenizer.batch_decode(produced[:, ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text.strip()
        if on_batch:
            on_batch(len(chosen))
    model.train(was_training)
    return answers


def _read_shared_prefix(model: Any, rows: Sequence[list[int]]) -> tuple[list[int], Any]:
    """The ids with which all rows begin, and the keys and values that the model computes for them."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    # At least one id of each row stays, for generate to begin with.
    shared = _common_start([row[:-1] for row in rows]) if len(rows) > 1 else []
    if not shared or model.config.is_encoder_decoder or _has_soft_prompt(model):
        return [], None
    cache = model(torch.tensor([shared], device=model.device), use_cache=True, logits_to_keep=1).past_key_values
    # Sliding windows and recurrent states keep no row for every token, so they can't be continued behind padding.
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return [], None
    return shared, cache


def _has_soft_prompt(model: Any) -> bool:
    """Whether an adapter puts vectors in front of the tokens, so that the tokens' keys and values aren't the first."""
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())


def _common_start(rows: Sequence[list[int]]) -> list[int]:
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return [column[0] for column in alike]


def _repeated(cache: Any, rows: int) -> Any:
    if cache is None:
        return None
    own = copy.deepcopy(cache)
    own.batch_repeat_interleave(rows)
    return own


def _pad_behind(
    prefix: list[int], rows: Sequence[list[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefix, padding, row: every row ends at the same place, where generation goes on."""
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    ids = [prefix + [pad_id] * gap + row for gap, row in zip(gaps, rows, strict=True)]
    mask = [[1] * len(prefix) + [0] * gap + [1] * len(row) for gap, row in zip(gaps, rows, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
