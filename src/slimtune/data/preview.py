"""Training data before training: its format and columns, examples with what is learned of them, and their lengths."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slimtune.data.batches import Encoded, PadRight, pieces
from slimtune.data.chat_template import use_template
from slimtune.data.encode import EncodedRows
from slimtune.data.lengths import PERCENTILES, Lengths, sorted_lengths
from slimtune.data.prefixes import PrefixGroups, sample_batches, tokens_of
from slimtune.data.reading import SourceRows, Splits, exact_shares, read_splits
from slimtune.data.rows import Conversation, Document, Instruction, Labelled, Tagged, Turn
from slimtune.data.settings import DataSettings
from slimtune.data.tasks.base import Remark, skipped_note, splits_report
from slimtune.data.tasks.causal_lm import encode_sources, mixed
from slimtune.data.tasks.preference import lengths_of
from slimtune.data.tasks.seq2seq import encode_pair, refuse_conversations
from slimtune.data.tasks.word_alignment import align
from slimtune.data.texts import tokenize
from slimtune.errors import ConfigError

Piece = tuple[bool, str]
"""A piece of an example's text, and whether it is learned."""
GROUPED_EXAMPLES = 4096
"""Of which it is counted what they begin with alike: the first of them, for more take long to sort."""


@dataclass(frozen=True)
class Preview:
    """Data as `slimtune data preview` shows it.

    Attributes:
        shares: how many examples an epoch takes of each source.
        lengths: of the examples of one epoch, in `unit`.
        unit: tokens, or characters without a tokenizer.
        samples: the first examples, in pieces.
        apart: examples beyond one for each row, because the chat template rewrites earlier turns.
        labels: how often each label occurs, for texts with labels.
        skipped: rows that were read and can't be encoded, where those are left out.
        encoded: the examples as token ids, for a model that writes text.
    """

    splits: Splits
    shares: list[int]
    lengths: Lengths
    unit: str
    samples: list[list[Piece]]
    apart: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    skipped: Sequence[Remark] = ()
    encoded: Sequence[Encoded] = ()

    @property
    def sources(self) -> list[SourceRows]:
        """The rows of each source."""
        return self.splits.train

    @property
    def report(self) -> list[Remark]:
        """What to know about the rows before they are learned."""
        return [*splits_report(self.splits), *self.skipped]

    def to_dict(self, max_length: int, batch_size: int) -> dict[str, Any]:
        """All of it in JSON's types."""
        lengths = self.lengths
        return {
            "task": self.splits.task,
            "sources": [
                {
                    "name": source.name,
                    "format": source.format,
                    "fields": dict(source.fields),
                    "rows": len(source.rows),
                    "examples_of_an_epoch": share,
                }
                for source, share in zip(self.sources, self.shares, strict=True)
            ],
            "columns": [
                {"source": source.name, "name": name, "rows": count, "used": name not in source.ignored}
                for source in self.sources
                for name, count in source.columns.items()
            ],
            "repeated_rows": self.splits.repeated,
            "notes": [f"{remark.warning}{remark.text}" for remark in self.report],
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
            **({"shared_prefixes": self.shared_prefixes(max_length, batch_size)} if self.encoded else {}),
        }

    def shared_prefixes(self, max_length: int, batch_size: int) -> dict[str, float]:
        """How many times fewer tokens are computed where rows of a batch share what they begin with.

        `drawn` is for batches as they are drawn, `grouped` for those of examples that begin alike
        (`training.group_prefixes`); each by a few batches.
        """
        rows = [Encoded(e.input_ids[:max_length], e.labels[:max_length]) for e in self.encoded[:GROUPED_EXAMPLES]]
        collate = PadRight(0)

        def ratio(groups: PrefixGroups | None) -> float:
            batches = sample_batches(
                lambda picked: collate([rows[i] for i in picked]), len(rows), batch_size, 0, groups
            )
            return tokens_of(batches).ratio

        return {"drawn": ratio(None), "grouped": ratio(PrefixGroups([row.input_ids for row in rows]))}


def preview(
    settings: DataSettings, tokenizer: Any = None, task: str = "auto", samples: int = 3, most: int | None = None
) -> Preview:
    """Read, encode and measure data; raises DataError, ConfigError.

    Args:
        tokenizer: of the model to train; without it rows are shown as they are read, and measured in characters.
        samples: how many examples are shown.
        most: rows that are read of each source; None for all.
    """
    # All rows are shown: which of them a seed would hold out is no property of the data.
    splits = read_splits(replace(settings, held_out=0.0), task, most=most)
    if settings.packing and splits.task != "text":
        raise ConfigError(f"packing is for models that write text, and not for task {splits.task}; leave it out")
    if tokenizer is not None and settings.chat_template is not None:
        use_template(tokenizer, settings.chat_template)
    if tokenizer is not None and splits.task == "text":
        # Through the template, whose marks are tokens as well, and which alone says which tokens are learned.
        return _encoded(splits, settings, tokenizer, samples)
    rows = [row for source in splits.train for row in source.rows]
    labels = dict(Counter(row.label for row in rows if isinstance(row, Labelled)).most_common())
    if tokenizer is None:
        texts = [pieces_of(row) for row in rows]
        characters = [sum(len(text) for _, text in example) for example in texts]
        learned = sum(len(text) for example in texts for is_learned, text in example if is_learned)
        lengths, unit = sorted_lengths(characters, learned, list(labels)), "characters"
    else:
        lengths, unit = sorted_lengths(*_measured(splits.task, rows, tokenizer), list(labels)), "tokens"
    shown = [pieces_of(row) for row in rows[:samples]]
    return Preview(splits, exact_shares(splits.train), lengths, unit, shown, labels=labels)


def _encoded(splits: Splits, settings: DataSettings, tokenizer: Any, samples: int) -> Preview:
    """The preview of what a model that writes text learns from, as training encodes it but at full length."""
    # At full length, since the preview is what a maximum is chosen by.
    encoded = encode_sources(splits.train, replace(settings, max_length=sys.maxsize, too_long="error"), tokenizer)
    # One epoch with its weights, since lengths are those that training will see: a source may come several times.
    examples = mixed(splits.train, encoded, seed=0)
    lengths = sorted_lengths([len(e.input_ids) for e in examples], sum(e.learned for e in examples))
    shares = exact_shares(splits.train, [len(rows.examples) for rows in encoded])
    shown = _first(encoded, tokenizer, samples)
    pairs = zip(splits.train, encoded, strict=True)
    skipped = [remark for source, rows in pairs for remark in skipped_note(source.name, rows.skipped)]
    apart = sum(rows.apart for rows in encoded)
    return Preview(splits, shares, lengths, "tokens", shown, apart, skipped=skipped, encoded=examples)


def _first(encoded: Sequence[EncodedRows], tokenizer: Any, samples: int) -> list[list[Piece]]:
    """The first examples, taken from all sources in turn, as text."""
    longest = max(len(rows.examples) for rows in encoded)
    # In turn: the first rows of one source say nothing of how the others are read.
    turns = [rows.examples[i] for i in range(min(longest, samples)) for rows in encoded if i < len(rows.examples)]
    return [[(learned, tokenizer.decode(ids)) for learned, ids in pieces(example)] for example in turns[:samples]]


def _measured(task: str, rows: Sequence[Any], tokenizer: Any) -> tuple[list[int], int]:
    """The tokens of each row that have to fit at once, and how many of all tokens are learned; raises DataError.

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
    lengths = [lengths_of(row, tokenizer) for row in rows]
    return [max(each) for each in lengths], sum(max(each) - each[0] for each in lengths)


def pieces_of(row: Any) -> list[Piece]:
    """A row as it was read, in pieces: the names of roles or columns, and the texts."""
    if isinstance(row, Conversation):
        turns = zip(row.messages, row.learned(), strict=True)
        return [piece for turn, learned in turns for piece in _of_turn(turn, learned)]
    if isinstance(row, Document):
        return [(True, row.text)]
    if isinstance(row, Tagged):
        words = zip(row.tokens, row.tags, strict=False)
        return [piece for word, tag in words for piece in ((False, f"{word}/"), (True, tag), (False, " "))]
    fields = {name: getattr(row, name) for name in type(row).model_fields if name != "plain_prompt"}
    if isinstance(row, Instruction) and not row.system:
        fields.pop("system")
    return [piece for name, value in fields.items() if value is not None for piece in _of_field(name, value)]


def _of_field(name: str, value: Any) -> list[Piece]:
    learned = name in ("completion", "chosen", "label")
    if not isinstance(value, list):
        return [(False, f"{name}: "), (learned, str(value)), (False, "\n")]
    return [(False, f"{name}:\n"), *(piece for turn in value for piece in _of_turn(turn, learned))]


def _of_turn(turn: Turn, learned: bool) -> list[Piece]:
    calls = turn.message().get("tool_calls")
    text = turn.content + (json.dumps(calls, ensure_ascii=False) if calls else "")
    return [(False, f"{turn.role}: "), (learned, text), (False, "\n")]
