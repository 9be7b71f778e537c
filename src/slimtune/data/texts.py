"""Texts to classify as ids: how long one may be, and what becomes of longer ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slimtune.data.batches import Limit
from slimtune.data.rows import Text
from slimtune.errors import DataError, check_choice


@dataclass(frozen=True)
class Tokenized:
    """Texts as the tokenizer's ids, and what happened to those that were too long.

    Attributes:
        rows: of each text that is left, the model's inputs.
        kept: the index of each of these among all texts.
    """

    rows: list[dict[str, list[int]]]
    kept: list[int]
    truncated: int

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def longest(self) -> int:
        """The tokens of the longest text."""
        return max(len(row["input_ids"]) for row in self.rows)


def positions_of(model: Any) -> int | None:
    """How many tokens the model has positions for, virtual tokens taken off; None if its config has no number."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    prompts = [config for config in getattr(model, "peft_config", {}).values() if config.is_prompt_learning]
    return None if positions is None else positions - sum(config.num_virtual_tokens for config in prompts)


def longest_input(model: Any, tokenizer: Any, max_length: int | None) -> int:
    """How many tokens a text may have: `max_length`, and no more than the model has positions."""
    # A tokenizer without a limit says 1e30, which never wins here.
    return min(n for n in (max_length, positions_of(model), tokenizer.model_max_length) if n is not None)


def tokenize(texts: Sequence[Text], tokenizer: Any, max_length: int, too_long: str = "error") -> Tokenized:
    """The ids of texts; raises DataError if some are too long, or if none is left."""
    check_choice("too_long", too_long, ("error", "drop", "truncate"))
    firsts = [text if isinstance(text, str) else text[0] for text in texts]
    seconds = [None if isinstance(text, str) else text[1] for text in texts]
    if len({second is None for second in seconds}) > 1:
        raise DataError("some rows have a text_pair and some have none; give all of them one, or none")
    everything = _encoded(tokenizer, firsts, seconds)
    over = [len(row["input_ids"]) for row in everything if len(row["input_ids"]) > max_length]
    Limit(max_length, too_long).refuse(over, len(everything), "texts")
    kept = [i for i, row in enumerate(everything) if len(row["input_ids"]) <= max_length]
    if over and too_long == "truncate":
        everything, kept = _encoded(tokenizer, firsts, seconds, max_length), list(range(len(texts)))
    if not kept:
        raise DataError(f"none of {len(everything)} texts is within {max_length} tokens; raise --max-length")
    return Tokenized([everything[i] for i in kept], kept, truncated=len(over) if too_long == "truncate" else 0)


def _encoded(tokenizer: Any, firsts: Any, seconds: Any, max_length: int | None = None) -> list[dict[str, list[int]]]:
    pairs = seconds if seconds and seconds[0] is not None else None
    # Without `verbose=False` the tokenizer warns of long texts, which are counted here.
    shorten = {"truncation": True, "max_length": max_length} if max_length else {"verbose": False}
    columns = tokenizer(firsts, pairs, return_attention_mask=True, **shorten)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
