"""Rows of training data as ids, of which the answers are learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from slimtune.data.rows import Conversation, Row
from slimtune.errors import DataError
from slimtune.template import assistant_spans, has_template

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """One example as ids, and the labels in which everything but the answers is ignored."""

    input_ids: list[int]
    labels: list[int]

    @property
    def learned(self) -> int:
        """How many tokens are learned."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class Prepared:
    """Encoded examples and what happened to those that were too long."""

    examples: list[Encoded]
    dropped: int
    truncated: int

    @property
    def tokens(self) -> int:
        """All tokens of one epoch."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def learned(self) -> int:
        """The tokens of one epoch that are learned."""
        return sum(example.learned for example in self.examples)

    @property
    def longest(self) -> int:
        """The tokens of the longest example."""
        return max(len(example.input_ids) for example in self.examples)


def encode(rows: Sequence[Row], tokenizer: Any, max_length: int, too_long: str = "error") -> Prepared:
    """Encode rows for training; raises DataError if some are too long, or if nothing would be learned."""
    _require_offsets(tokenizer)
    everything = []
    for number, row in enumerate(rows, 1):
        try:
            everything.append(encode_row(row, tokenizer))
        except DataError as error:
            raise DataError(f"example {number} of {len(rows)}: {error}") from error
    over = [example for example in everything if len(example.input_ids) > max_length]
    if over and too_long == "error":
        longest = max(len(example.input_ids) for example in over)
        raise DataError(
            f"{len(over)} of {len(everything)} examples are longer than {max_length} tokens (the longest has "
            f"{longest}); pass --max-length {longest}, or choose with --too-long drop or --too-long truncate"
        )
    kept = [example for example in everything if len(example.input_ids) <= max_length]
    if too_long == "truncate":
        kept = [_fit(example, max_length) for example in everything]
    examples = [example for example in kept if example.learned]
    if not examples:
        raise DataError(
            f"0% of the tokens would be learned: none of {len(everything)} examples has an answer within "
            f"{max_length} tokens; check that the data has assistant turns, and raise --max-length"
        )
    dropped = len(everything) - len(examples)
    return Prepared(examples, dropped, truncated=len(over) if too_long == "truncate" else 0)


def encode_row(row: Row, tokenizer: Any) -> Encoded:
    """One row as ids and labels, its end of turn among what is learned; raises DataError."""
    text, spans, templated = _text(row, tokenizer)
    # A template writes the special tokens itself; the tokenizer would add a second beginning of sequence.
    tokens = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
    ids, offsets = list(tokens["input_ids"]), tokens["offset_mapping"]
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise DataError(
            f"the text begins with {tokenizer.bos_token} twice; remove it from the data, the template adds its own"
        )
    labels = [IGNORED] * len(ids)
    for position, (start, end) in enumerate(offsets):
        # A token that begins in the template and ends in the answer is learned: the answer begins with it.
        if end > start and any(start < high and end > low for low, high in spans):
            labels[position] = ids[position]
    return _ended(ids, labels, tokenizer)


def pieces(example: Encoded) -> Iterator[tuple[bool, list[int]]]:
    """The example cut into runs of ids that are all learned or all not."""
    marked = zip(example.labels, example.input_ids, strict=True)
    for learned, run in groupby(marked, key=lambda pair: pair[0] != IGNORED):
        yield learned, [token for _, token in run]


def _text(row: Row, tokenizer: Any) -> tuple[str, list[tuple[int, int]], bool]:
    if has_template(tokenizer):
        return *assistant_spans(tokenizer, row.turns()), True
    if isinstance(row, Conversation):
        raise DataError(
            "the tokenizer has no chat template, so conversations can't be rendered; train an instruct model, "
            "or give the data as prompt and completion"
        )
    return row.prompt + row.completion, [(len(row.prompt), len(row.prompt) + len(row.completion))], False


def _ended(ids: list[int], labels: list[int], tokenizer: Any) -> Encoded:
    """Make sure that the last answer ends with a token at which generation stops."""
    learned = [position for position, label in enumerate(labels) if label != IGNORED]
    special = {
        *tokenizer.all_special_ids,
        *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special),
    }
    if learned and ids[learned[-1]] not in special and tokenizer.eos_token_id is not None:
        # What the template puts behind the answer without an end would never be generated.
        ids, labels = ids[: learned[-1] + 1], labels[: learned[-1] + 1]
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    return Encoded(ids, labels)


def _fit(example: Encoded, max_length: int) -> Encoded:
    return Encoded(example.input_ids[:max_length], example.labels[:max_length])


def _require_offsets(tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} can't tell which text its tokens come from, so answers can't be told from "
            f"questions; load the fast tokenizer of the model (tokenizer.json)"
        )
