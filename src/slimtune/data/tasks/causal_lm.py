"""What a model is trained and judged on: rows of all sources as conversations or classes, encoded and mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimtune.data.batches import Objective, PackRows, classification, pad_id_of
from slimtune.data.chat_template import use_template
from slimtune.data.mixing import drawn, exact_shares, mixed, prepare
from slimtune.data.packing import check_packs, pack
from slimtune.data.reading import Parts, sources_of
from slimtune.data.settings import DataSettings
from slimtune.data.show import show_data, show_labels, show_preview, show_sources
from slimtune.data.tasks.classification import Tokenized, labels_of, longest_input, positions_of, tokenize
from slimtune.errors import ConfigError, DataError, listing
from slimtune.metrics.classification import classify, scores
from slimtune.models.load import LoadOptions, load_model

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Lesson:
    """What a model is trained and judged on.

    Attributes:
        facts: what a model card says of the data.
        after: what can be said only once the training is over.
    """

    examples: Any
    held_out: Sequence[Any]
    facts: dict[str, Any]
    objective: Objective | None = None
    judge: Callable[[Any], dict[str, float]] = lambda model: {}
    after: Callable[[], dict[str, Any]] = dict


def epoch_of(
    parts: Parts,
    settings: DataSettings,
    seed: int,
    of_texts: Sequence[str] = ("packing", "streaming", "chat_template"),
) -> tuple[list[Any], list[Any]]:
    """The rows of one epoch of all sources, and those held out; raises ConfigError for settings `of_texts` alone."""
    for name in of_texts:
        if getattr(settings, name):
            raise ConfigError(f"{name} is for models that write text, and not for task {parts.task}; leave it out")
    if settings.too_long == "split":
        raise ConfigError(
            f"too_long: split is for texts to go on with, and not for task {parts.task}; drop or truncate"
        )
    shares = zip(parts.train, exact_shares(parts.train), strict=True)
    rows = [row for part, count in shares for row in drawn(part.rows, count, seed)]
    return rows, [row for part in parts.held_out for row in part.rows]


@dataclass(frozen=True)
class EpochData:
    """The rows of one epoch of all sources and those held out, and how long one may be.

    A task's data is one of these with a `load`, which takes what `slimtune.models.load.load` does, and a `lesson`.

    Attributes:
        source: what the sources are called.
    """

    source: str
    rows: list[Any]
    held_out: list[Any]
    max_length: int
    too_long: str

    def facts(self, examples: int, held_out: int, tokens: int, limit: int, **more: Any) -> dict[str, Any]:
        """What a model card says of the data."""
        counted = {"source": self.source, "examples": examples, "held out": held_out, "tokens": f"{tokens:,}"}
        return counted | more | {"maximum length": limit}


@dataclass(frozen=True)
class Conversations:
    """Conversations whose answers are learned, and texts that are learned whole."""

    parts: Parts
    settings: DataSettings
    seed: int = 0

    task = "text"
    task_type = "CAUSAL_LM"

    def load(self, source: str, *how: Any, **options: Any) -> tuple[Any, Any]:
        """A model that writes text, and its tokenizer."""
        model, tokenizer = load_model(source, "text", LoadOptions(*how, **options))
        if model.config.is_encoder_decoder:
            raise ConfigError(f"{source} has an encoder, which reads prompts on its own: train it with task=seq2seq")
        return model, tokenizer

    def lesson(self, screen: Console, model: Any, tokenizer: Any) -> Lesson:
        """The ids, shown with what is learned of them; raises DataError, ConfigError if the model can't pack."""
        if self.settings.chat_template is not None:
            use_template(tokenizer, self.settings.chat_template)
        if self.settings.packing:
            check_packs(model)
        positions = positions_of(model)
        prepared = prepare(self.parts.train, self.settings, tokenizer, positions)
        held_out = [
            example
            for found in prepare(self.parts.held_out, self.settings, tokenizer, positions)
            for example in found.examples
        ]
        examples = mixed(self.parts.train, prepared, self.seed)
        show_sources(screen, self.parts.train, prepared, self.settings)
        show_data(screen, examples, held_out)
        show_preview(screen, tokenizer, examples[0])
        tokens = sum(len(example.input_ids) for example in examples)
        facts = {
            "source": sources_of(self.parts.train),
            "examples": len(examples),
            "held out": len(held_out),
            "tokens": f"{tokens:,}",
            "learned": f"{sum(example.learned for example in examples) / tokens:.0%}",
            "maximum length": self.settings.max_length,
        }
        if not self.settings.packing:
            return Lesson(examples, held_out, facts)
        rows = pack(examples, room := self.settings.max_length)
        screen.print(
            f"packed into {len(rows):,} rows of at most {room:,} tokens, {tokens / (len(rows) * room):.0%} full"
        )
        objective = Objective(PackRows.of(model, pad_id_of(tokenizer)))
        return Lesson(rows, held_out, facts | {"packed rows": len(rows)}, objective)


@dataclass(frozen=True)
class Classes(EpochData):
    """Texts whose labels are learned."""

    labels: list[str]

    task = "classification"
    task_type = "SEQ_CLS"

    @classmethod
    def of(cls, parts: Parts, settings: DataSettings, seed: int = 0) -> Classes:
        """The texts of all sources; raises DataError for labels that were never learned, ConfigError for packing."""
        rows, held_out = epoch_of(parts, settings, seed)
        labels = labels_of(rows if settings.held_out_sources else rows + held_out)
        unknown = {row.label for row in held_out} - set(labels)
        name = sources_of(parts.train)
        if unknown:
            there = sources_of(parts.held_out)
            raise DataError(f"{there} has labels that {name} hasn't: {listing(unknown)}; correct them")
        return cls(name, rows, held_out, settings.max_length, settings.too_long, labels)

    def load(self, source: str, *how: Any, **options: Any) -> tuple[Any, Any]:
        """A model with a head for the labels, and its tokenizer."""
        return load_model(source, "classification", LoadOptions(*how, **options), self.labels)

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
        facts = self.facts(len(learned), len(true), rows.tokens, limit, labels=self.labels)

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
