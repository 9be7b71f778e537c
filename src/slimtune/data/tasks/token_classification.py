"""Words whose tags are learned."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Self

from slimtune.data.batches import Objective, token_loss
from slimtune.data.reading import Splits
from slimtune.data.rows import Tagged
from slimtune.data.settings import DataSettings
from slimtune.data.tasks.base import (
    HELD_OUT,
    EncodedDataset,
    Remark,
    Report,
    TaskData,
    held_out_note,
    lost,
    refuse_unlearned,
)
from slimtune.data.tasks.word_alignment import OUTSIDE, AlignedTexts, align, tag, tags_of
from slimtune.data.texts import longest_input
from slimtune.errors import counted
from slimtune.metrics.tagging import tag_scores


@dataclass(frozen=True)
class Tags(TaskData):
    """Texts as words, each of which has a tag; `names` are the tags."""

    task_type = "TOKEN_CLS"
    model_task = "token-classification"

    @classmethod
    def of(cls, splits: Splits, settings: DataSettings, seed: int = 0) -> Self:
        """The texts of all sources; raises DataError for tags that were never learned, ConfigError for packing."""
        data = super().of(splits, settings, seed)
        tags = tags_of([row.tags for row in (data.rows if settings.held_out_sources else data.rows + data.held_out)])
        refuse_unlearned(splits, "tags", tags, [tag for row in data.held_out for tag in row.tags])
        return replace(data, names=tags)

    @property
    def tags(self) -> list[str]:
        """The tags, in the order of the outputs."""
        return self.names or []

    def encode(self, model: Any, tokenizer: Any) -> EncodedDataset:
        """The ids with the tags at the first token of each word; raises DataError."""
        from transformers import DataCollatorForTokenClassification

        limit, too_long = longest_input(model, tokenizer, self.settings.max_length), self.settings.too_long
        learned = align([row.tokens for row in self.rows], tokenizer, limit, too_long)
        held_out = AlignedTexts([], [])
        if self.held_out:
            held_out = align([row.tokens for row in self.held_out], tokenizer, limit, too_long)
        true = [self.held_out[i].tags for i in held_out.kept]
        report = self._report(learned, held_out, limit)
        facts = self.facts(len(learned.texts), len(true), learned.tokens, limit, tags=self.tags)

        def judge(model: Any) -> dict[str, float]:
            return tag_scores(tag(model, tokenizer, held_out.texts), true) if true else {}

        def numbered(aligned: AlignedTexts, rows: list[Tagged]) -> list[dict[str, list[int]]]:
            pairs = zip(aligned.texts, aligned.kept, strict=True)
            return [text.labelled([self.tags.index(tag) for tag in rows[i].tags]) for text, i in pairs]

        objective = Objective(DataCollatorForTokenClassification(tokenizer), token_loss)
        examples = numbered(learned, self.rows)
        return EncodedDataset(examples, numbered(held_out, self.held_out), facts, report, objective, judge)

    def _report(self, learned: AlignedTexts, held_out: AlignedTexts, limit: int) -> Report:
        """How many words there are of each tag, and what became of long texts."""
        counts = Counter(itertools.chain(*(self.rows[i].tags for i in learned.kept)))
        tags = ", ".join(f"{tag}: {counts[tag]:,}" for tag in self.tags if tag != OUTSIDE)
        remark = Remark(
            f"data: {counted(len(learned.texts), 'text')} of {counts.total():,} words ({tags}), "
            f"{learned.tokens:,} tokens" + held_out_note(len(held_out.texts), "texts ")
        )
        report = [
            remark,
            *lost("text", limit, len(self.rows) - len(learned.texts), learned.truncated),
            *lost(f"{HELD_OUT}text", limit, len(self.held_out) - len(held_out.texts), held_out.truncated),
        ]
        if learned.without_token:
            words = f"{learned.without_token:,} words are not learned"
            report.append(Remark(": cut off, or no token is left of them", words))
        return report
