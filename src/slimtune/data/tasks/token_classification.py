"""Words whose tags are learned."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

from slimtune.data.batches import Objective, token_loss
from slimtune.data.reading import Parts, sources_of
from slimtune.data.rows import Tagged
from slimtune.data.settings import DataSettings
from slimtune.data.tasks.base import EncodedDataset, Remark, Report, TaskData, epoch_of, held_out_note, refuse_unlearned
from slimtune.data.tasks.classification import longest_input
from slimtune.data.tasks.word_alignment import OUTSIDE, AlignedTexts, align, tag, tags_of
from slimtune.metrics.tagging import tag_scores
from slimtune.models.load import LoadOptions, load_model


@dataclass(frozen=True)
class Tags(TaskData):
    """Texts as words, each of which has a tag."""

    tags: list[str]

    task = "token-classification"
    task_type = "TOKEN_CLS"

    @classmethod
    def of(cls, parts: Parts, settings: DataSettings, seed: int = 0) -> Tags:
        """The texts of all sources; raises DataError for tags that were never learned, ConfigError for packing."""
        rows, held_out = epoch_of(parts, settings, seed)
        tags = tags_of([row.tags for row in (rows if settings.held_out_sources else rows + held_out)])
        refuse_unlearned(parts, "tags", tags, [tag for row in held_out for tag in row.tags])
        return cls(sources_of(parts.train), rows, held_out, settings.max_length, settings.too_long, tags)

    def load(self, source: str, *how: Any, **options: Any) -> tuple[Any, Any]:
        """A model with a head for the tags, and its tokenizer."""
        return load_model(source, "token-classification", LoadOptions(*how, **options), self.tags)

    def encode(self, model: Any, tokenizer: Any) -> EncodedDataset:
        """The ids with the tags at the first token of each word; raises DataError."""
        from transformers import DataCollatorForTokenClassification

        limit = longest_input(model, tokenizer, self.max_length)
        learned = align([row.tokens for row in self.rows], tokenizer, limit, self.too_long)
        there = AlignedTexts([], [])
        if self.held_out:
            there = align([row.tokens for row in self.held_out], tokenizer, limit, self.too_long)
        true = [self.held_out[i].tags for i in there.kept]
        report = self._report(learned, len(true), limit)
        facts = self.facts(len(learned.texts), len(true), learned.tokens, limit, tags=self.tags)

        def judge(model: Any) -> dict[str, float]:
            return tag_scores(tag(model, tokenizer, there.texts), true) if true else {}

        def numbered(found: AlignedTexts, rows: list[Tagged]) -> list[dict[str, list[int]]]:
            pairs = zip(found.texts, found.kept, strict=True)
            return [text.labelled([self.tags.index(tag) for tag in rows[i].tags]) for text, i in pairs]

        objective = Objective(DataCollatorForTokenClassification(tokenizer), token_loss)
        examples, held_out = numbered(learned, self.rows), numbered(there, self.held_out)
        return EncodedDataset(examples, held_out, facts, report, objective, judge)

    def _report(self, learned: AlignedTexts, held_out: int, limit: int) -> Report:
        """How many words there are of each tag, and what became of long texts."""
        counts = Counter(itertools.chain(*(self.rows[i].tags for i in learned.kept)))
        tags = ", ".join(f"{tag}: {counts[tag]:,}" for tag in self.tags if tag != OUTSIDE)
        report: Report = [
            Remark(
                f"data: {len(learned.texts):,} texts of {counts.total():,} words ({tags}), {learned.tokens:,} tokens"
                + held_out_note(held_out, "texts ")
            )
        ]
        if dropped := len(self.rows) - len(learned.texts):
            report.append(Remark(f": longer than {limit:,} tokens", f"{dropped:,} texts dropped"))
        if learned.truncated:
            report.append(Remark(f" at {limit:,} tokens", f"{learned.truncated:,} texts cut"))
        if learned.without_token:
            lost = f"{learned.without_token:,} words are not learned"
            report.append(Remark(": cut off, or no token is left of them", lost))
        return report
