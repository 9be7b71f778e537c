"""Answers to many prompts at once: what they all begin with is read once, the rest in batches of similar length."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from slimtune.data.batches import pad_id_of
from slimtune.data.chat_template import prompt_ids
from slimtune.engine.weights import reordered_weights
from slimtune.errors import ConfigError
from slimtune.storage.foreign import reading

_MEND = "see its generation_config.json and config.json"


def sampling(temperature: float) -> dict[str, Any]:
    """The arguments of `generate` for a temperature, 0 being greedy; raises ConfigError below 0."""
    if temperature < 0:
        raise ConfigError(f"temperature must not be negative, but is {temperature}; pass 0 for greedy decoding")
    if temperature == 0:
        # Named one by one, because a model's generation_config may set them and then warns.
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature}


class Reply(NamedTuple):
    """An answer, and whether the model ended it before it had as many tokens as it may."""

    text: str
    ended: bool


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    batch_size: int = 32,
) -> list[str]:
    """The answers to rendered prompts, in their order; raises ConfigError for a negative temperature."""
    replies = generate_replies(model, tokenizer, prompts, max_new_tokens, temperature, batch_size)
    return [reply.text for reply in replies]


@torch.inference_mode()
def generate_replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    batch_size: int = 32,
    on_batch: Callable[[dict[int, Reply]], None] | None = None,
    stop: str | None = None,
) -> list[Reply]:
    """As `generate_batch`, with word of the answers that were cut off.

    Args:
        on_batch: is told the answers of each batch, by the number of their prompt.
        stop: text at which an answer is over besides the end of turn; it and what follows are left out.
    """
    was_training = model.training
    model.eval()
    if model.config.is_encoder_decoder:
        # `render` ends a plain prompt with a line break, behind which a decoder goes on; an encoder learned from none.
        prompts = [prompt.removesuffix("\n") for prompt in prompts]
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    # A system prompt or a set of shots is often most of a prompt: read once, not once for each question.
    prefix, cache = read_shared_prefix(model, rows)
    replies: dict[int, Reply] = {}
    steps = -(-len(rows) // batch_size) * max_new_tokens
    options = sampling(temperature) | ({"stop_strings": stop, "tokenizer": tokenizer} if stop else {})
    with reordered_weights(model, steps):
        for start in range(0, len(rows), batch_size):
            chosen = by_length[start : start + batch_size]
            ids, mask = _padded(model, prefix, [rows[index][len(prefix) :] for index in chosen], pad_id_of(tokenizer))
            # What a model's generation_config.json asks for meets its use here for the first time.
            with reading(f"{model.name_or_path or 'the model'} can't write text", _MEND, ConfigError):
                produced = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    past_key_values=repeated(cache, len(chosen)),
                    max_new_tokens=max_new_tokens,
                    pad_token_id=pad_id_of(tokenizer),
                    **options,
                )
            # A decoder of its own begins with one start token; a causal model gives the prompt back in front.
            answers = produced[:, 1:] if model.config.is_encoder_decoder else produced[:, ids.shape[1] :]
            answered = _replies(model, tokenizer, answers, max_new_tokens, stop)
            batch = dict(zip(chosen, answered, strict=True))
            replies |= batch
            if on_batch:
                on_batch(batch)
    model.train(was_training)
    return [replies[index] for index in range(len(rows))]


def _replies(model: Any, tokenizer: Any, produced: torch.Tensor, most: int, stop: str | None) -> list[Reply]:
    """What was produced as text; `produced` holds ids_BT of at most `most` tokens a row."""
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=produced.device).flatten()
    # Shorter than the limit, every row of the batch has ended, by an end token or a stop string.
    has_end = torch.isin(produced, ends).any(-1).tolist() if produced.shape[1] >= most else [True] * len(produced)
    texts = tokenizer.batch_decode(produced, skip_special_tokens=True)
    # White space in front is no end: the answer hasn't begun.
    cut = [text.lstrip().partition(stop) if stop else (text, "", "") for text in texts]
    return [
        Reply(text.strip(), ended or bool(stop_found))
        for (text, stop_found, _), ended in zip(cut, has_end, strict=True)
    ]


def read_shared_prefix(model: Any, rows: Sequence[list[int]]) -> tuple[list[int], Any]:
    """The ids with which all rows begin, and the keys and values that the model computes for them."""
    # At least one id of each row stays, for generate to begin with.
    shared = _common_start([row[:-1] for row in rows]) if len(rows) > 1 else []
    if not shared or model.config.is_encoder_decoder or _has_soft_prompt(model):
        return [], None
    cache = model(torch.tensor([shared], device=model.device), use_cache=True, **kept_logits(model, 1)).past_key_values
    return (shared, cache) if _is_plain_cache(cache) else ([], None)


def _is_plain_cache(cache: Any) -> bool:
    """Whether it has a row for every token: sliding windows and recurrent states can't be continued behind padding."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


@contextmanager
def equal_prompts_read_once(model: Any) -> Iterator[None]:
    """While it is open, `model.generate` reads equal prompts of a batch once, as where several answers are drawn."""
    generate = model.generate

    def reading_once(*args: Any, **kwargs: Any) -> Any:
        cache = None if args else _read_once(model, kwargs)
        return generate(*args, **kwargs, **({} if cache is None else {"past_key_values": cache}))

    vars(model)["generate"] = reading_once
    try:
        yield
    finally:
        del vars(model)["generate"]


_ABOUT_TOKENS = {"input_ids", "attention_mask", "generation_config", "disable_compile"}
"""Arguments of `generate` under which a prompt is its tokens and nothing else."""


@torch.no_grad()
def _read_once(model: Any, given: Mapping[str, Any]) -> Any:
    """The cache of all prompts but for their last token, each distinct one read once; None where nothing is saved."""
    ids_BT, mask_BT = given.get("input_ids"), given.get("attention_mask")
    own_cache = getattr(given.get("generation_config"), "cache_implementation", None)
    if given.keys() - _ABOUT_TOKENS or ids_BT is None or mask_BT is None or own_cache or ids_BT.shape[1] < 2:
        return None
    if model.config.is_encoder_decoder or _has_soft_prompt(model):
        return None
    # With the mask: a pad may be a token of another prompt.
    distinct, index_B = torch.unique(torch.stack([ids_BT, mask_BT], -1), dim=0, return_inverse=True)
    if len(distinct) == len(ids_BT):
        return None
    ids, mask = distinct[:, :-1, 0], distinct[:, :-1, 1]
    # Pads are in front, and a token's position is counted from the first that is none, as `generate` counts it.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    read = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **kept_logits(model, 1)
    ).past_key_values
    if not _is_plain_cache(read):
        return None
    read.batch_select_indices(index_B)
    return read


def kept_logits(model: Any, count: int) -> dict[str, int]:
    """The argument by which a model computes the logits of the last tokens alone, where it knows of it."""
    # All of the MRO: an adopted model's wrapped forward, or one behind a decorator, may show another signature.
    forwards = [vars(known)["forward"] for known in type(model).__mro__ if "forward" in vars(known)]
    knows = any("logits_to_keep" in inspect.signature(forward).parameters for forward in forwards)
    return {"logits_to_keep": count} if knows else {}


def _has_soft_prompt(model: Any) -> bool:
    """Whether an adapter puts vectors in front of the tokens, so that the tokens' keys and values aren't the first."""
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())


def _common_start(rows: Sequence[list[int]]) -> list[int]:
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return [column[0] for column in alike]


def repeated(cache: Any, rows: int) -> Any:
    """A copy of the shared keys and values for so many rows."""
    if cache is None:
        return None
    # `generate` appends to its cache in place: the next batch needs the prefix alone.
    own = copy.deepcopy(cache)
    own.batch_repeat_interleave(rows)
    return own


def _padded(model: Any, prefix: list[int], rows: Sequence[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefix, padding, row, so that all rows end where generation goes on; an encoder reads from the left."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = longest - len(row)
        before, behind = (0, gap) if model.config.is_encoder_decoder else (gap, 0)
        # Pads between prefix and row, never before the prefix: its keys are cached at positions 0 to n - 1.
        ids.append(prefix + [pad_id] * before + row + [pad_id] * behind)
        mask.append([1] * len(prefix) + [0] * before + [1] * len(row) + [0] * behind)
    return torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)
