"""Preferences, judgements and prompts, in the columns from which TRL's trainers learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from slimtune.data.batches import IGNORED, Limit
from slimtune.data.chat_template import Message, has_template, prompt_ids, render, use_template
from slimtune.data.encode import encode_row
from slimtune.data.reading import Splits, names_of
from slimtune.data.rows import Conversation, Judged, Pair, Preference, Prompt, Turn
from slimtune.data.settings import DataSettings
from slimtune.data.tasks.base import HELD_OUT, EncodedDataset, Remark, Report, TaskData, held_out_note, lost, sample_of
from slimtune.errors import ConfigError, DataError, require

Said = str | list[Turn]


def trl_columns(row: Preference | Judged | Prompt, tokenizer: Any) -> dict[str, Any]:
    """A row as TRL wants it: messages for a tokenizer with a chat template, else texts; raises DataError."""
    columns: dict[str, Any] = {"prompt": _said(row.prompt, "user", tokenizer)}
    if isinstance(row, Prompt):
        # TRL hands every other column to the reward functions, by its name.
        return columns | (row.model_extra or {})
    for name in ("chosen", "rejected", "completion"):
        if hasattr(row, name):
            columns[name] = _said(getattr(row, name), "assistant", tokenizer)
    return columns | ({"label": row.label} if isinstance(row, Judged) else {})


def _said(said: Said, role: str, tokenizer: Any) -> str | list[Message]:
    if not has_template(tokenizer):
        if isinstance(said, str):
            return said
        raise DataError(
            "the tokenizer has no chat template, so messages can't be rendered; train an instruct model, or give "
            "prompts and answers as texts"
        )
    return [{"role": role, "content": said}] if isinstance(said, str) else [turn.message() for turn in said]


def as_conversation(prompt: Said, answer: Said) -> Conversation | Pair:
    """A prompt with one of its answers, which alone is learned."""
    if isinstance(prompt, str) and isinstance(answer, str):
        return Pair(prompt=prompt, completion=answer)
    shown = [Turn(role="user", content=prompt, weight=0)] if isinstance(prompt, str) else prompt
    said = [Turn(role="assistant", content=answer, weight=1)] if isinstance(answer, str) else answer
    return Conversation(messages=[*(turn.model_copy(update={"weight": 0}) for turn in shown), *said])


def _unpaired(rows: Sequence[Preference | Judged]) -> list[Judged]:
    """Judged answers; of a pair, both answers, each judged by itself."""
    judged: list[Judged] = []
    for row in rows:
        if isinstance(row, Preference):
            judged.append(Judged(prompt=row.prompt, completion=row.chosen, label=True))
            judged.append(Judged(prompt=row.prompt, completion=row.rejected, label=False))
        else:
            judged.append(row)
    return judged


@dataclass(frozen=True)
class Preferred(TaskData):
    """What preference tuning and reinforcement by a reward learn from."""

    task_type = "CAUSAL_LM"
    model_task = "text"
    supports = ("chat_template",)

    @classmethod
    def of(cls, splits: Splits, settings: DataSettings, seed: int = 0) -> Self:
        """The rows of all sources; raises ConfigError for packing, and DataError if kto has one kind of answer only."""
        data = super().of(splits, settings, seed)
        if splits.task == "grpo" and settings.too_long == "truncate":
            raise ConfigError("too_long: truncate would leave half of a question; drop, or raise max_length")
        if splits.task != "kto":
            return data
        rows = _unpaired(data.rows)
        if len({row.label for row in rows}) < 2:
            raise DataError(
                f"all answers of {names_of(splits.train)} have the label {rows[0].label}, so that nothing tells "
                "good from bad; add the others"
            )
        return replace(data, rows=rows, held_out=_unpaired(data.held_out))

    def encode(self, model: Any, tokenizer: Any) -> EncodedDataset:
        """A `datasets.Dataset` in TRL's columns; raises DataError, MissingDependencyError."""
        if self.settings.chat_template is not None:
            use_template(tokenizer, self.settings.chat_template)
        report: Report = []
        learned, tokens = self._within(report, self.rows, tokenizer)
        held_out = self._within(report, self.held_out, tokenizer, HELD_OUT)[0] if self.held_out else []
        kind = {"kto": "judged answers", "grpo": "prompts"}.get(self.task, "pairs of answers")
        report.append(Remark(f"data: {len(learned):,} {kind}, {tokens:,} tokens" + held_out_note(len(held_out), "")))
        report += _samples(learned[0], tokenizer)
        facts = self.facts(len(learned), len(held_out), tokens, self.settings.max_length)
        there = _dataset(held_out, tokenizer) if held_out else []
        return EncodedDataset(_dataset(learned, tokenizer), there, facts, report)

    def _within(self, report: Report, rows: Sequence[Any], tokenizer: Any, which: str = "") -> tuple[list[Any], int]:
        """The rows that are within the limit, or that TRL will cut to it, and their tokens; reports what was lost."""
        limit, too_long = self.settings.max_length, self.settings.too_long
        lengths = [lengths_of(row, tokenizer) for row in rows]
        over = [max(length) for length in lengths if max(length) > limit]
        Limit(limit, too_long).refuse(over, len(rows), "rows")
        # TRL cuts at the end: of a prompt that fills the room no answer would be left.
        cuts = too_long == "truncate"
        kept = [i for i, length in enumerate(lengths) if max(length) <= limit or (cuts and length[0] < limit)]
        if not kept:
            raise DataError(f"none of {len(rows)} rows is within {limit} tokens; raise max_length")
        dropped = len(rows) - len(kept)
        report += lost(f"{which}row", limit, dropped, len(over) - dropped)
        return [rows[i] for i in kept], sum(min(length, limit) for i in kept for length in lengths[i][1:])


def _samples(row: Any, tokenizer: Any) -> Report:
    """The answer of a row that is preferred or judged; nothing for a prompt alone."""
    if isinstance(row, Prompt):
        return []
    is_pair = isinstance(row, Preference)
    how = "preferred" if is_pair else "judged good" if row.label else "judged bad"
    example = encode_row(as_conversation(row.prompt, row.chosen if is_pair else row.completion), tokenizer)
    return [Remark(f"an answer that is {how}:"), sample_of(example, tokenizer)]


def _answers(row: Preference | Judged) -> list[Said]:
    return [row.chosen, row.rejected] if isinstance(row, Preference) else [row.completion]


def lengths_of(row: Any, tokenizer: Any) -> list[int]:
    """The tokens of the prompt, and of the prompt with each answer; of a prompt alone twice the same."""
    if isinstance(row, Prompt):
        return [len(prompt_ids(tokenizer, render(tokenizer, row.turns(), for_answer=True)))] * 2
    encoded = [encode_row(as_conversation(row.prompt, answer), tokenizer) for answer in _answers(row)]
    # The earliest learned token of both: tokens across the boundary may differ between two answers.
    before = min(next(i for i, label in enumerate(e.labels) if label != IGNORED) for e in encoded)
    return [before, *(len(e.input_ids) for e in encoded)]


def _dataset(rows: Sequence[Any], tokenizer: Any) -> Any:
    require("datasets", extra="train", purpose="training on preferences")
    from datasets import Dataset

    return Dataset.from_list([trl_columns(row, tokenizer) for row in rows])
