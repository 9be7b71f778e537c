"""Data looked at before training: its format, examples with what is learned of them, and how long they are."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slimtune.data.chat_template import use_template
from slimtune.data.encode import Encoded, pieces
from slimtune.data.lengths import PERCENTILES, Lengths, sorted_lengths
from slimtune.data.mixing import exact_shares, mixed, prepare
from slimtune.data.reading import Part, read_parts
from slimtune.data.rows import Conversation, Document, Instruction, Labelled, Tagged, Turn
from slimtune.data.settings import DataSettings
from slimtune.data.tasks.classification import tokenize
from slimtune.data.tasks.preference import lengths_of
from slimtune.data.tasks.seq2seq import encode_pair, refuse_conversations
from slimtune.data.tasks.word_alignment import align
from slimtune.errors import ConfigError

Piece = tuple[bool, str]
"""A part of an example, and whether it is learned."""


@dataclass(frozen=True)
class Preview:
    """What there is to see of data.

    Attributes:
        shares: how many examples an epoch takes of each source.
        apart: examples that there are beside one for each row, because the template rewrites earlier turns.
        unit: what lengths are counted in: tokens, or characters without a tokenizer.
        samples: the first examples in pieces.
        labels: how often each occurs, of texts with labels.
    """

    task: str
    parts: list[Part]
    shares: list[int]
    lengths: Lengths
    unit: str
    samples: list[list[Piece]]
    apart: int = 0
    labels: dict[str, int] = field(default_factory=dict)

    def to_dict(self, max_length: int, batch_size: int) -> dict[str, Any]:
        """All of it for machines."""
        lengths = self.lengths
        return {
            "task": self.task,
            "sources": [
                {"name": part.name, "format": part.format, "rows": len(part.rows), "examples_of_an_epoch": share}
                for part, share in zip(self.parts, self.shares, strict=True)
            ],
            "examples": lengths.examples,
            "examples_of_answers_apart": self.apart,
            "unit": self.unit,
            "total": lengths.total,
            "learned": lengths.learned,
            "longest": lengths.longest,
            "percentiles": {str(share): lengths.percentile(share) for share in PERCENTILES},
            "histogram": [{"up_to": end, "examples": count} for end, count in lengths.histogram()],
            **(self._in_rows(max_length, batch_size) if self.unit == "tokens" else {}),
            **({"labels": self.labels} if self.labels else {}),
            "samples": [[{"learned": learned, "text": text} for learned, text in sample] for sample in self.samples],
        }

    def _in_rows(self, max_length: int, batch_size: int) -> dict[str, Any]:
        within = self.lengths.within(max_length)
        return {
            "max_length": max_length,
            "longer": self.lengths.over(max_length),
            "padding": within.padding_waste(batch_size),
            "packed_rows": within.packed_rows(max_length),
            "packed_padding": within.packed_waste(max_length),
        }


def preview(settings: DataSettings, tokenizer: Any = None, task: str = "auto", samples: int = 3) -> Preview:
    """Read, encode and measure data; raises DataError, ConfigError.

    Args:
        tokenizer: of the model that is to learn; without it rows are shown as they are read, in characters.
    """
    parts = read_parts(replace(settings, held_out=0.0), task)
    if settings.packing and parts.task != "text":
        raise ConfigError(f"packing is for models that write text, and not for task {parts.task}; leave it out")
    rows = [row for part in parts.train for row in part.rows]
    labels = dict(Counter(row.label for row in rows if isinstance(row, Labelled)).most_common())
    if tokenizer is None:
        shown = [pieces_of(row) for row in rows]
        lengths = sorted_lengths([_characters(example) for example in shown], sum(map(_learned, shown)), list(labels))
        shares = exact_shares(parts.train)
        return Preview(parts.task, parts.train, shares, lengths, "characters", shown[:samples], labels=labels)
    if settings.chat_template is not None:
        use_template(tokenizer, settings.chat_template)
    if parts.task != "text":
        lengths = sorted_lengths(*measured(parts.task, rows, tokenizer), list(labels))
        shown, shares = [pieces_of(row) for row in rows[:samples]], exact_shares(parts.train)
        return Preview(parts.task, parts.train, shares, lengths, "tokens", shown, labels=labels)
    prepared = prepare(parts.train, replace(settings, max_length=sys.maxsize, too_long="error"), tokenizer)
    examples = mixed(parts.train, prepared, seed=0)
    lengths = sorted_lengths([len(e.input_ids) for e in examples], sum(e.learned for e in examples))
    shown = [[(learned, tokenizer.decode(ids)) for learned, ids in pieces(e)] for e in _first(prepared, samples)]
    shares = exact_shares(parts.train, [len(found.examples) for found in prepared])
    return Preview(
        parts.task, parts.train, shares, lengths, "tokens", shown, apart=sum(found.apart for found in prepared)
    )


def _first(prepared: Sequence[Any], samples: int) -> list[Encoded]:
    """Examples of all sources in turn, so that each is seen."""
    longest = max(len(found.examples) for found in prepared)
    turns = (found.examples[i] for i in range(longest) for found in prepared if i < len(found.examples))
    return [example for example, _ in zip(turns, range(samples), strict=False)]


def pieces_of(row: Any) -> list[Piece]:
    """A row as it was read, in pieces: who or what, and what is said."""
    if isinstance(row, Conversation):
        said = zip(row.messages, row.learned(), strict=True)
        return [piece for turn, learned in said for piece in _turn(turn, learned)]
    if isinstance(row, Document):
        return [(True, row.text)]
    if isinstance(row, Tagged):
        words = zip(row.tokens, row.tags, strict=False)
        return [piece for word, tag in words for piece in ((False, f"{word}/"), (True, tag), (False, " "))]
    fields = {name: getattr(row, name) for name in type(row).model_fields if name != "plain_prompt"}
    if isinstance(row, Instruction) and not row.system:
        fields.pop("system")
    return [piece for name, value in fields.items() if value is not None for piece in _field(name, value)]


def _field(name: str, value: Any) -> list[Piece]:
    learned = name in ("completion", "chosen", "label")
    if not isinstance(value, list):
        return [(False, f"{name}: "), (learned, str(value)), (False, "\n")]
    return [(False, f"{name}:\n"), *(piece for turn in value for piece in _turn(turn, learned))]


def _turn(turn: Turn, learned: bool) -> list[Piece]:
    calls = turn.message().get("tool_calls")
    said = turn.content + (json.dumps(calls, ensure_ascii=False) if calls else "")
    return [(False, f"{turn.role}: "), (learned, said), (False, "\n")]


def _characters(example: list[Piece]) -> int:
    return sum(len(text) for _, text in example)


def _learned(example: list[Piece]) -> int:
    return sum(len(text) for learned, text in example if learned)


def measured(task: str, rows: Sequence[Any], tokenizer: Any) -> tuple[list[int], int]:
    """The tokens of each row that have to fit at once, and how many of all of them are learned; raises DataError.

    Of prompt and completion the longer one counts, of a pair of answers the longer one with its prompt.
    """
    if task == "classification":
        ids = tokenize([row.texts for row in rows], tokenizer, sys.maxsize).rows
        return [len(row["input_ids"]) for row in ids], len(rows)
    if task == "token-classification":
        texts = align([row.tokens for row in rows], tokenizer, sys.maxsize).texts
        return [len(text.input["input_ids"]) for text in texts], sum(len(text.firsts) for text in texts)
    if task == "seq2seq":
        refuse_conversations(rows, "the data")
        pairs = [encode_pair(row, tokenizer) for row in rows]
        return [pair.longer for pair in pairs], sum(len(pair.labels) for pair in pairs)
    found = [lengths_of(row, tokenizer) for row in rows]
    return [max(each) for each in found], sum(max(each) - each[0] for each in found)
