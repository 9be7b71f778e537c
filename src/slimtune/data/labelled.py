"""Texts with labels: rows of JSONL or CSV, and their ids."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, field_validator

from slimtune.data.rows import checked, objects, read_text
from slimtune.data.settings import TOO_LONG
from slimtune.errors import ConfigError, DataError, did_you_mean

_QUOTE = "put fields with commas or line breaks in them between quotation marks"

Text = str | tuple[str, str]
"""One text, or two that are judged together."""


class Unlabelled(BaseModel):
    """A row with `text`, and a second one if two are judged together."""

    text: str
    text_pair: str | None = None

    @property
    def texts(self) -> Text:
        """The text, or both."""
        return self.text if self.text_pair is None else (self.text, self.text_pair)


class Labelled(Unlabelled):
    """A row with `text` and `label`; a label is a name, whatever it is written as."""

    label: str

    @field_validator("label", mode="before")
    @classmethod
    def _as_name(cls, value: Any) -> Any:
        return str(value) if isinstance(value, bool | int) else value


@dataclass(frozen=True)
class Tokenized:
    """Texts as the tokenizer's ids, and what happened to those that were too long."""

    rows: list[dict[str, list[int]]]
    kept: list[int]
    """Which texts the rows are."""
    truncated: int

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def longest(self) -> int:
        """The tokens of the longest text."""
        return max(len(row["input_ids"]) for row in self.rows)


def has_labels(path: Path) -> bool:
    """Whether the file's first row has a label, so that a classifier is trained on it; raises DataError."""
    return path.suffix.lower() == ".csv" or "label" in next(iter(objects(path)))[0]


def read_labelled(path: Path) -> list[Labelled]:
    """The rows to learn from; raises DataError with the line at fault."""
    return [checked(Labelled, value, where) for value, where in _records(path)]


def read_texts(path: Path) -> list[Unlabelled]:
    """The rows to judge, with their labels where they have one; raises DataError with the line at fault."""
    return [checked(Labelled if "label" in value else Unlabelled, value, where) for value, where in _records(path)]


def labels_of(rows: Sequence[Labelled]) -> list[str]:
    """The labels in their order: by number if all are numbers; raises DataError if there is one only."""
    found = {row.label for row in rows}
    if len(found) < 2:
        raise DataError(f"all rows have the label {found.pop()!r}, so there is nothing to tell apart; add other rows")
    are_numbers = all(label.removeprefix("-").isdecimal() for label in found)
    return sorted(sorted(found), key=int) if are_numbers else sorted(found)


def longest_input(model: Any, tokenizer: Any, max_length: int | None) -> int:
    """How many tokens a text may have: what was asked for, and no more than the model has positions."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(n for n in (max_length, positions, tokenizer.model_max_length) if n is not None)


def tokenize(texts: Sequence[Text], tokenizer: Any, max_length: int, too_long: str = "error") -> Tokenized:
    """The ids of texts; raises DataError if some are too long, or if none is left."""
    if too_long not in TOO_LONG:
        raise ConfigError(f"too_long takes {', '.join(TOO_LONG)}, found '{too_long}'{did_you_mean(too_long, TOO_LONG)}")
    firsts = [text if isinstance(text, str) else text[0] for text in texts]
    seconds = [None if isinstance(text, str) else text[1] for text in texts]
    if len({second is None for second in seconds}) > 1:
        raise DataError("some rows have a text_pair and some have none; give all of them one, or none")
    everything = _encoded(tokenizer, firsts, seconds)
    over = [len(row["input_ids"]) for row in everything if len(row["input_ids"]) > max_length]
    if over and too_long == "error":
        raise DataError(
            f"{len(over)} of {len(everything)} texts are longer than {max_length} tokens (the longest has "
            f"{max(over)}); raise --max-length where the model has the positions, or choose with --too-long drop or "
            f"--too-long truncate"
        )
    kept = [i for i, row in enumerate(everything) if len(row["input_ids"]) <= max_length]
    if over and too_long == "truncate":
        everything, kept = _encoded(tokenizer, firsts, seconds, max_length), list(range(len(texts)))
    if not kept:
        raise DataError(f"none of {len(everything)} texts is within {max_length} tokens; raise --max-length")
    return Tokenized([everything[i] for i in kept], kept, truncated=len(over) if too_long == "truncate" else 0)


def _encoded(tokenizer: Any, firsts: Any, seconds: Any, max_length: int | None = None) -> list[dict[str, list[int]]]:
    pairs = seconds if seconds and seconds[0] is not None else None
    shorten = {"truncation": True, "max_length": max_length} if max_length else {"verbose": False}
    columns = tokenizer(firsts, pairs, return_attention_mask=True, **shorten)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    if path.suffix.lower() != ".csv":
        yield from objects(path)
        return
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        rows = [(row, f"{path}, line {reader.line_num}") for row in reader]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is not CSV ({error}); {_QUOTE}") from error
    if not rows:
        raise DataError(f"the data file {path} holds no example; write a line of column names and one line a row")
    for row, where in rows:
        if None in row or None in row.values():
            raise DataError(f"{where} has another number of fields than the first line; {_QUOTE}")
        # An empty second text is none.
        yield {name: value for name, value in row.items() if value or name != "text_pair"}, where
