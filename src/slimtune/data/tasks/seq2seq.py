"""Prompts for an encoder, and the completions that its decoder learns to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from slimtune.data.batches import IGNORED, Encoded, Limit, Objective, token_loss
from slimtune.data.chat_template import has_template, render
from slimtune.data.reading import Splits, names_of
from slimtune.data.rows import Conversation, Pair
from slimtune.data.settings import DataSettings
from slimtune.data.tasks.base import HELD_OUT, EncodedDataset, Remark, Report, TaskData, held_out_note, lost, sample_of
from slimtune.data.texts import longest_input
from slimtune.errors import DataError, counted


@dataclass(frozen=True)
class EncodedPair:
    """A prompt's ids, for the encoder, and a completion's, for the decoder."""

    input_ids: list[int]
    labels: list[int]

    @property
    def longer(self) -> int:
        """The tokens of the longer one of both."""
        return max(len(self.input_ids), len(self.labels))

    def cut(self, limit: int) -> EncodedPair:
        """Both with no more than so many tokens, of which the last stays: it ends the text."""

        def fit(ids: list[int]) -> list[int]:
            return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]

        return EncodedPair(fit(self.input_ids), fit(self.labels))


def encode_pair(row: Pair, tokenizer: Any) -> EncodedPair:
    """Prompt and completion as the tokenizer writes each of them, the completion with its end; raises DataError."""
    prompt, completion = row.plain()
    if has_template(tokenizer):
        prompt = render(tokenizer, row.turns()[:-1], for_answer=True)
    if not completion:
        raise DataError("the completion is empty, so nothing would be learned from it; add the answer")
    # A template writes its own special tokens; `verbose` would warn of texts beyond a maximum that is checked here.
    ids = tokenizer(prompt, add_special_tokens=not has_template(tokenizer), verbose=False)["input_ids"]
    # `text_target`: mBART, NLLB and others write another language token for the decoder.
    labels = tokenizer(text_target=completion, verbose=False)["input_ids"]
    # T5's tokenizer ends a text by itself, others don't; without an end the model never learns to stop.
    ends = [] if labels[-1:] == [tokenizer.eos_token_id] or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return EncodedPair(list(ids), [*labels, *ends])


def refuse_conversations(rows: Sequence[Any], name: str) -> None:
    """Raises: DataError, for prompts of several messages."""
    if any(isinstance(row, Conversation) for row in rows):
        raise DataError(
            f"{name} has prompts that are lists of messages, and an encoder reads one text; write prompt and "
            "completion as texts"
        )


@dataclass(frozen=True)
class Completions(TaskData):
    """Prompts whose completions are learned by a model with an encoder and a decoder."""

    task_type = "SEQ_2_SEQ_LM"
    model_task = "seq2seq"

    @classmethod
    def of(cls, splits: Splits, settings: DataSettings, seed: int = 0) -> Self:
        """The pairs of all sources; raises DataError for conversations of several turns, ConfigError for packing."""
        data = super().of(splits, settings, seed)
        refuse_conversations(data.rows + data.held_out, names_of(splits.train))
        return data

    def encode(self, model: Any, tokenizer: Any) -> EncodedDataset:
        """The ids of prompts and completions; raises DataError."""
        from transformers import DataCollatorForSeq2Seq

        limit = longest_input(model, tokenizer, self.settings.max_length)
        report: Report = []
        examples = self._encoded(report, self.rows, tokenizer, limit)
        held_out = self._encoded(report, self.held_out, tokenizer, limit, HELD_OUT) if self.held_out else []
        read, learned = (sum(len(getattr(e, name)) for e in examples) for name in ("input_ids", "labels"))
        first = examples[0]
        as_one = Encoded(first.input_ids + first.labels, [IGNORED] * len(first.input_ids) + first.labels)
        report += [
            Remark(
                f"data: {counted(len(examples), 'pair')}, {read:,} tokens read and {learned:,} learned; "
                f"the longest has {max(example.longer for example in examples):,}"
                + held_out_note(len(held_out), "pairs ")
            ),
            sample_of(as_one, tokenizer),
        ]
        share = f"{learned / (read + learned):.0%}"
        facts = self.facts(len(examples), len(held_out), read + learned, limit, learned=share)
        # With the model, by which it makes decoder_input_ids: the labels shifted right, as each architecture starts
        # them.
        objective = Objective(DataCollatorForSeq2Seq(tokenizer, model=model), token_loss)
        return EncodedDataset([vars(e) for e in examples], [vars(e) for e in held_out], facts, report, objective)

    def _encoded(
        self, report: Report, rows: Sequence[Pair], tokenizer: Any, limit: int, which: str = ""
    ) -> list[EncodedPair]:
        """The pairs within the limit, or cut to it; reports what was lost."""
        unit = f"{which}pair"
        everything = [encode_pair(row, tokenizer) for row in rows]
        over = [example.longer for example in everything if example.longer > limit]
        Limit(limit, self.settings.too_long).refuse(over, len(everything), "pairs")
        if over and self.settings.too_long == "truncate":
            report.append(Remark(f" at {limit:,} tokens of prompt or completion", f"{counted(len(over), unit)} cut"))
            return [example.cut(limit) for example in everything]
        kept = [example for example in everything if example.longer <= limit]
        if not kept:
            raise DataError(f"none of {len(everything)} pairs is within {limit} tokens; raise max_length")
        report += lost(unit, limit, len(over), 0)
        return kept
