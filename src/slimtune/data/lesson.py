"""What a model is trained and judged on: rows of a file as conversations or classes, read and encoded."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from slimtune.data.batches import Objective, classification
from slimtune.data.encode import encode
from slimtune.data.labelled import (
    Labelled,
    Tokenized,
    has_labels,
    labels_of,
    longest_input,
    read_labelled,
    tokenize,
)
from slimtune.data.rows import Row, read_rows
from slimtune.data.settings import DataSettings
from slimtune.data.shown import show_data, show_labels, show_preview
from slimtune.errors import DataError, listing
from slimtune.evaluate.classification import classify, scores
from slimtune.loading import load_classifier, load_text_model

if TYPE_CHECKING:
    from rich.console import Console

R = TypeVar("R")


def read(settings: DataSettings, task: str = "auto", seed: int = 0) -> Data:
    """Rows of conversations, or of labelled texts if the first one has a label; raises DataError, ConfigError."""
    path = Path(settings.train[0].path)
    if not has_labels(path):
        return Conversations(str(path), *_split(settings, read_rows, seed), settings.max_length, settings.too_long)
    rows, held_out = _split(settings, read_labelled, seed)
    labels = labels_of(rows if settings.held_out_sources else rows + held_out)
    unknown = {row.label for row in held_out} - set(labels)
    if unknown:
        there = settings.held_out_sources[0].path
        raise DataError(f"{there} has labels that {path} hasn't: {listing(unknown)}; correct them")
    return Classes(str(path), labels, rows, held_out, settings.max_length, settings.too_long)


def _split(settings: DataSettings, read: Callable[[Path], list[R]], seed: int) -> tuple[list[R], list[R]]:
    rows = [row for source in settings.train for row in read(Path(source.path))]
    if settings.held_out_sources:
        return rows, [row for source in settings.held_out_sources for row in read(Path(source.path))]
    random.Random(seed).shuffle(rows)
    count = round(len(rows) * settings.held_out_share)
    if count == len(rows):
        raise DataError(f"nothing is left of {len(rows)} examples to learn from; hold out a smaller share")
    return rows[count:], rows[:count]


@dataclass(frozen=True)
class Lesson:
    """What a model is trained and judged on."""

    examples: Sequence[Any]
    held_out: Sequence[Any]
    facts: dict[str, Any]
    objective: Objective | None = None
    judge: Callable[[Any], dict[str, float]] = lambda model: {}


@dataclass(frozen=True)
class Conversations:
    """Conversations whose answers are learned."""

    source: str
    rows: list[Row]
    held_out: list[Row]
    max_length: int
    too_long: str

    task_type = "CAUSAL_LM"

    def load(
        self, source: str, dtype: str, device: str, trust_remote_code: bool, quantize: str | None = None
    ) -> tuple[Any, Any]:
        """A model that writes text, and its tokenizer."""
        return load_text_model(source, dtype, device, trust_remote_code, quantize)

    def lesson(self, screen: Console, model: Any, tokenizer: Any) -> Lesson:
        """The ids, shown with what is learned of them; raises DataError."""
        prepared = encode(self.rows, tokenizer, self.max_length, self.too_long)
        held_out = encode(self.held_out, tokenizer, self.max_length, self.too_long).examples if self.held_out else []
        show_data(screen, prepared, held_out, self.max_length)
        show_preview(screen, tokenizer, prepared.examples[0])
        facts = {
            "source": Path(self.source).name,
            "examples": len(prepared.examples),
            "held out": len(held_out),
            "tokens": f"{prepared.tokens:,}",
            "learned": f"{prepared.learned / prepared.tokens:.0%}",
            "maximum length": self.max_length,
        }
        return Lesson(prepared.examples, held_out, facts)


@dataclass(frozen=True)
class Classes:
    """Texts whose labels are learned."""

    source: str
    labels: list[str]
    rows: list[Labelled]
    held_out: list[Labelled]
    max_length: int
    too_long: str

    task_type = "SEQ_CLS"

    def load(
        self, source: str, dtype: str, device: str, trust_remote_code: bool, quantize: str | None = None
    ) -> tuple[Any, Any]:
        """A model with a head for the labels, and its tokenizer."""
        return load_classifier(source, self.labels, dtype, device, trust_remote_code, quantize)

    def lesson(self, screen: Console, model: Any, tokenizer: Any) -> Lesson:
        """The ids with their labels' numbers; raises DataError."""
        limit = longest_input(model, tokenizer, self.max_length)
        rows = tokenize([row.texts for row in self.rows], tokenizer, limit, self.too_long)
        held_out = Tokenized([], [], 0)
        if self.held_out:
            held_out = tokenize([row.texts for row in self.held_out], tokenizer, limit, self.too_long)
        learned = [self.rows[i] for i in rows.kept]
        true = [self.held_out[i].label for i in held_out.kept]
        show_labels(screen, [row.label for row in learned], rows, len(self.rows), true, limit)
        facts = {
            "source": Path(self.source).name,
            "examples": len(learned),
            "held out": len(true),
            "labels": self.labels,
            "tokens": f"{rows.tokens:,}",
            "maximum length": limit,
        }

        def judge(model: Any) -> dict[str, float]:
            if not true:
                return {}
            likeliest = classify(model, tokenizer, held_out.rows).argmax(-1).tolist()
            return scores([self.labels[number] for number in likeliest], true)

        def numbered(tokenized: Tokenized, labels: list[str]) -> list[dict[str, Any]]:
            pairs = zip(tokenized.rows, labels, strict=True)
            return [row | {"labels": self.labels.index(label)} for row, label in pairs]

        examples = numbered(rows, [row.label for row in learned])
        return Lesson(examples, numbered(held_out, true), facts, classification(tokenizer), judge)


Data = Conversations | Classes
