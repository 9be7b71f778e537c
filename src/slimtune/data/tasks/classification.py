"""Texts whose labels are learned: their ids, and the numbers of their labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slimtune.data.batches import classification
from slimtune.data.encode import Limit
from slimtune.data.reading import Parts, sources_of
from slimtune.data.rows import Labelled, Text
from slimtune.data.settings import DataSettings
from slimtune.data.tasks.base import EncodedDataset, Remark, Report, TaskData, epoch_of, held_out_note, refuse_unlearned
from slimtune.errors import DataError, check_choice
from slimtune.metrics.classification import classify, scores
from slimtune.models.load import LoadOptions, load_model


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


def labels_of(rows: Sequence[Labelled]) -> list[str]:
    """The labels in their order: by number if all are numbers; raises DataError if there is one only."""
    found = {row.label for row in rows}
    if len(found) < 2:
        raise DataError(f"all rows have the label {found.pop()!r}, so there is nothing to tell apart; add other rows")
    are_numbers = all(label.removeprefix("-").isdecimal() for label in found)
    return sorted(sorted(found), key=int) if are_numbers else sorted(found)


def positions_of(model: Any) -> int | None:
    """How many tokens the model has positions for, those of virtual tokens taken off; None if it tells no number."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    prompts = [config for config in getattr(model, "peft_config", {}).values() if config.is_prompt_learning]
    return None if positions is None else positions - sum(config.num_virtual_tokens for config in prompts)


def longest_input(model: Any, tokenizer: Any, max_length: int | None) -> int:
    """How many tokens a text may have: what was asked for, and no more than the model has positions."""
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
    shorten = {"truncation": True, "max_length": max_length} if max_length else {"verbose": False}
    columns = tokenizer(firsts, pairs, return_attention_mask=True, **shorten)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@dataclass(frozen=True)
class Classes(TaskData):
    """Texts whose labels are learned."""

    labels: list[str]

    task = "classification"
    task_type = "SEQ_CLS"

    @classmethod
    def of(cls, parts: Parts, settings: DataSettings, seed: int = 0) -> Classes:
        """The texts of all sources; raises DataError for labels that were never learned, ConfigError for packing."""
        rows, held_out = epoch_of(parts, settings, seed)
        labels = labels_of(rows if settings.held_out_sources else rows + held_out)
        refuse_unlearned(parts, "labels", labels, [row.label for row in held_out])
        return cls(sources_of(parts.train), rows, held_out, settings.max_length, settings.too_long, labels)

    def load(self, source: str, *how: Any, **options: Any) -> tuple[Any, Any]:
        """A model with a head for the labels, and its tokenizer."""
        return load_model(source, "classification", LoadOptions(*how, **options), self.labels)

    def encode(self, model: Any, tokenizer: Any) -> EncodedDataset:
        """The ids with their labels' numbers; raises DataError."""
        limit = longest_input(model, tokenizer, self.max_length)
        rows = tokenize([row.texts for row in self.rows], tokenizer, limit, self.too_long)
        held_out = Tokenized([], [], 0)
        if self.held_out:
            held_out = tokenize([row.texts for row in self.held_out], tokenizer, limit, self.too_long)
        learned = [self.rows[i] for i in rows.kept]
        true = [self.held_out[i].label for i in held_out.kept]
        counts = ", ".join(f"{label}: {n:,}" for label, n in sorted(Counter(row.label for row in learned).items()))
        report: Report = [
            Remark(
                f"data: {len(learned):,} texts ({counts}), {rows.tokens:,} tokens; the longest has {rows.longest:,}"
                + held_out_note(len(true), "texts ")
            )
        ]
        if dropped := len(self.rows) - len(learned):
            report.append(Remark(f": longer than {limit:,} tokens", f"{dropped:,} texts dropped"))
        if rows.truncated:
            report.append(Remark(f" at {limit:,} tokens", f"{rows.truncated:,} texts cut"))
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
        return EncodedDataset(examples, numbered(held_out, true), facts, report, classification(tokenizer), judge)
