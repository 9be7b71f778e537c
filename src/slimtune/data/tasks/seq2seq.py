"""Prompts for an encoder, and the completions that its decoder learns to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimtune.data.batches import Objective, token_loss
from slimtune.data.chat_template import has_template, render
from slimtune.data.encode import IGNORED, Encoded, Limit
from slimtune.data.reading import Parts, sources_of
from slimtune.data.rows import Conversation, Pair
from slimtune.data.settings import DataSettings
from slimtune.data.show import show_preview
from slimtune.data.tasks.causal_lm import EpochData, Lesson, epoch_of
from slimtune.data.tasks.classification import longest_input
from slimtune.errors import DataError
from slimtune.models.load import LoadOptions, load_model

if TYPE_CHECKING:
    from rich.console import Console


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
    ids = tokenizer(prompt, add_special_tokens=not has_template(tokenizer), verbose=False)["input_ids"]
    labels = tokenizer(text_target=completion, verbose=False)["input_ids"]
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
class Completions(EpochData):
    """Prompts whose completions are learned by a model with an encoder and a decoder."""

    task = "seq2seq"
    task_type = "SEQ_2_SEQ_LM"

    @classmethod
    def of(cls, parts: Parts, settings: DataSettings, seed: int = 0) -> Completions:
        """The pairs of all sources; raises DataError for conversations of several turns, ConfigError for packing."""
        rows, held_out = epoch_of(parts, settings, seed)
        refuse_conversations(rows + held_out, sources_of(parts.train))
        return cls(sources_of(parts.train), rows, held_out, settings.max_length, settings.too_long)

    def load(self, source: str, *how: Any, **options: Any) -> tuple[Any, Any]:
        """A model with an encoder and a decoder, and its tokenizer."""
        return load_model(source, "seq2seq", LoadOptions(*how, **options))

    def lesson(self, screen: Console, model: Any, tokenizer: Any) -> Lesson:
        """The ids, shown with what is learned of them; raises DataError."""
        from transformers import DataCollatorForSeq2Seq

        limit = longest_input(model, tokenizer, self.max_length)
        examples = self._encoded(screen, self.rows, tokenizer, limit)
        held_out = self._encoded(screen, self.held_out, tokenizer, limit) if self.held_out else []
        read, learned = (sum(len(getattr(e, name)) for e in examples) for name in ("input_ids", "labels"))
        screen.print(
            f"data: {len(examples):,} pairs, {read:,} tokens read and {learned:,} learned; the longest has "
            f"{max(example.longer for example in examples):,}"
            + (f"; {len(held_out):,} pairs held out" if held_out else "")
        )
        first = examples[0]
        behind = [IGNORED] * len(first.input_ids)
        show_preview(screen, tokenizer, Encoded(first.input_ids + first.labels, behind + first.labels))
        share = f"{learned / (read + learned):.0%}"
        facts = self.facts(len(examples), len(held_out), read + learned, limit, learned=share)
        objective = Objective(DataCollatorForSeq2Seq(tokenizer, model=model), token_loss)
        return Lesson(*([vars(e) for e in part] for part in (examples, held_out)), facts, objective)  # type: ignore[misc]

    def _encoded(self, screen: Console, rows: Sequence[Pair], tokenizer: Any, limit: int) -> list[EncodedPair]:
        everything = [encode_pair(row, tokenizer) for row in rows]
        over = [example.longer for example in everything if example.longer > limit]
        Limit(limit, self.too_long).refuse(over, len(everything), "pairs")
        if over and self.too_long == "truncate":
            screen.print(f"[yellow]{len(over):,} pairs cut[/] at {limit:,} tokens of prompt or completion")
            return [example.cut(limit) for example in everything]
        kept = [example for example in everything if example.longer <= limit]
        if not kept:
            raise DataError(f"none of {len(everything)} pairs is within {limit} tokens; raise max_length")
        if over:
            screen.print(f"[yellow]{len(over):,} pairs dropped[/]: longer than {limit:,} tokens")
        return kept
