"""Texts whose labels are learned: their ids, and the numbers of their labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from slimtune.data.batches import classification
from slimtune.data.reading import Splits
from slimtune.data.rows import Labelled
from slimtune.data.settings import DataSettings
from slimtune.data.tasks.base import HELD_OUT, EncodedDataset, Remark, TaskData, held_out_note, lost, refuse_unlearned
from slimtune.data.texts import Tokenized, longest_input, tokenize
from slimtune.errors import DataError, counted
from slimtune.metrics.classification import classify, scores


def labels_of(rows: Sequence[Labelled]) -> list[str]:
    """The labels in their order: by number if all are numbers; raises DataError if there is only one."""
    labels = {row.label for row in rows}
    if len(labels) < 2:
        raise DataError(f"all rows have the label {labels.pop()!r}, so there is nothing to tell apart; add other rows")
    are_numbers = all(label.removeprefix("-").isdecimal() for label in labels)
    # Twice, so that "1" and "01" have a fixed order.
    return sorted(sorted(labels), key=int) if are_numbers else sorted(labels)


@dataclass(frozen=True)
class Classes(TaskData):
    """Texts whose labels are learned; `names` are the labels."""

    task_type = "SEQ_CLS"
    model_task = "classification"

    @classmethod
    def of(cls, splits: Splits, settings: DataSettings, seed: int = 0) -> Self:
        """The texts of all sources; raises DataError for labels that were never learned, ConfigError for packing."""
        data = super().of(splits, settings, seed)
        # Of a share that was drawn at random a rare label may have gone to the held-out rows alone; the head knows it
        # all the same.
        labels = labels_of(data.rows if settings.held_out_sources else data.rows + data.held_out)
        refuse_unlearned(splits, "labels", labels, [row.label for row in data.held_out])
        return replace(data, names=labels)

    @property
    def labels(self) -> list[str]:
        """The labels, in the order of the outputs."""
        return self.names or []

    def encode(self, model: Any, tokenizer: Any) -> EncodedDataset:
        """The ids with their labels' numbers; raises DataError."""
        limit, too_long = longest_input(model, tokenizer, self.settings.max_length), self.settings.too_long
        rows = tokenize([row.texts for row in self.rows], tokenizer, limit, too_long)
        held_out = Tokenized([], [], 0)
        if self.held_out:
            held_out = tokenize([row.texts for row in self.held_out], tokenizer, limit, too_long)
        learned = [self.rows[i].label for i in rows.kept]
        true = [self.held_out[i].label for i in held_out.kept]
        counts = ", ".join(f"{label}: {n:,}" for label, n in sorted(Counter(learned).items()))
        remark = Remark(
            f"data: {counted(len(learned), 'text')} ({counts}), {rows.tokens:,} tokens; "
            f"the longest has {rows.longest:,}" + held_out_note(len(true), "texts ")
        )
        report = [
            remark,
            *lost("text", limit, len(self.rows) - len(learned), rows.truncated),
            *lost(f"{HELD_OUT}text", limit, len(self.held_out) - len(true), held_out.truncated),
        ]
        facts = self.facts(len(learned), len(true), rows.tokens, limit, labels=self.labels)

        def judge(model: Any) -> dict[str, float]:
            if not true:
                return {}
            likeliest = classify(model, tokenizer, held_out.rows).argmax(-1).tolist()
            return scores([self.labels[number] for number in likeliest], true)

        def numbered(tokenized: Tokenized, labels: list[str]) -> list[dict[str, Any]]:
            pairs = zip(tokenized.rows, labels, strict=True)
            return [row | {"labels": self.labels.index(label)} for row, label in pairs]

        examples = numbered(rows, learned)
        return EncodedDataset(examples, numbered(held_out, true), facts, report, classification(tokenizer), judge)
