"""The lengths of a user's own examples, as training would read them, or of examples that are assumed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slimtune.data.batches import Limit
from slimtune.data.chat_template import use_template
from slimtune.data.encode import fitted
from slimtune.data.lengths import Lengths, sorted_lengths
from slimtune.data.settings import DataSettings
from slimtune.data.tasks.causal_lm import Conversations, mixed
from slimtune.data.tasks.classification import Classes
from slimtune.data.tasks.preference import Preferred, lengths_of
from slimtune.data.tasks.registry import Data, read
from slimtune.data.tasks.seq2seq import Completions, encode_pair
from slimtune.data.tasks.token_classification import Tags
from slimtune.data.tasks.word_alignment import align
from slimtune.data.texts import tokenize
from slimtune.errors import check_whole

ASSUMED_EXAMPLES = 1000
"""Where none can be counted."""


@dataclass(frozen=True)
class MeasuredData:
    """The examples of a task.

    Attributes:
        task: as a recipe names it.
        lengths: of what is read at once: of a pair of answers the longer one with its prompt, for grpo the prompt.
        answer: the most tokens that a decoder writes; None where what is written is part of what is read.
        examples: token ids of texts, of which batches are drawn.
    """

    task: str
    lengths: Lengths
    answer: int | None = None
    examples: Sequence[Sequence[int]] = ()


def measure(data: str | Path | DataSettings, tokenizer: Any, task: str = "auto") -> MeasuredData:
    """The examples as `slimtune train` would read and encode them; raises DataError, ConfigError.

    Packed rows and examples that are streamed are taken to be as long as they may be.
    """
    settings = data if isinstance(data, DataSettings) else DataSettings(data)
    if settings.streaming:
        return MeasuredData("text", uniform(settings.max_length, ASSUMED_EXAMPLES))
    return measure_read(read(settings, task), settings, tokenizer)


def measure_read(data: Data, settings: DataSettings, tokenizer: Any) -> MeasuredData:
    """As `measure`, of rows that were read already, with the settings that they are to be trained with.

    Nothing is cut: the plan says how many examples are longer than it reads.
    """
    if settings.streaming:
        return MeasuredData("text", uniform(settings.max_length, ASSUMED_EXAMPLES))
    if settings.chat_template is not None:
        use_template(tokenizer, settings.chat_template)
    measured = _MEASURES.get(data.task, _preferred)(data, tokenizer)
    if not settings.packing:
        return measured
    rows = measured.lengths.packed_rows(settings.max_length)
    return replace(measured, lengths=uniform(settings.max_length, rows), examples=())


def uniform(length: int, examples: int) -> Lengths:
    """Examples that are all of one length, where no data was given; all of it is learned."""
    check_whole("length", length, 2)
    check_whole("examples", examples)
    return Lengths((length,) * examples, length * examples)


def _texts(data: Conversations, tokenizer: Any) -> MeasuredData:
    encoded = [fitted(whole, Limit(sys.maxsize, "error")) for whole in data.whole(tokenizer)]
    examples = mixed(data.splits.train, encoded, data.seed)
    lengths = sorted_lengths([len(e.input_ids) for e in examples], sum(e.learned for e in examples))
    return MeasuredData("text", lengths, examples=[e.input_ids for e in examples])


def _classes(data: Classes, tokenizer: Any) -> MeasuredData:
    encoded = tokenize([row.texts for row in data.rows], tokenizer, sys.maxsize)
    lengths = [len(row["input_ids"]) for row in encoded.rows]
    return MeasuredData("classification", sorted_lengths(lengths, len(data.rows), data.labels))


def _tags(data: Tags, tokenizer: Any) -> MeasuredData:
    texts = align([row.tokens for row in data.rows], tokenizer, sys.maxsize).texts
    lengths = [len(text.input["input_ids"]) for text in texts]
    return MeasuredData(data.task, sorted_lengths(lengths, sum(len(text.firsts) for text in texts), data.tags))


def _completions(data: Completions, tokenizer: Any) -> MeasuredData:
    pairs = [encode_pair(row, tokenizer) for row in data.rows]
    written = [len(pair.labels) for pair in pairs]
    return MeasuredData("seq2seq", sorted_lengths([len(pair.input_ids) for pair in pairs], sum(written)), max(written))


def _preferred(data: Preferred, tokenizer: Any) -> MeasuredData:
    lengths_of_rows = [lengths_of(row, tokenizer) for row in data.rows]
    # Tokens of both answers are learned from; the prompt in front of each is masked.
    learned = sum(length - prompt for prompt, *answers in lengths_of_rows for length in answers)
    # TRL's orpo puts a beginning and an end where a text has none of its own.
    more = 2 if data.task == "orpo" else 0
    return MeasuredData(data.task, sorted_lengths([max(lengths) + more for lengths in lengths_of_rows], learned))


_MEASURES: dict[str, Callable[[Any, Any], MeasuredData]] = {
    "text": _texts,
    "classification": _classes,
    "token-classification": _tags,
    "seq2seq": _completions,
}
