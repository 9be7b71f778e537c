"""Prompting: questions fitted into the positions of a model, answered in batches, with the losses of the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimtune.data.chat_template import has_template, prompt_ids
from slimtune.data.texts import longest_input
from slimtune.errors import DataError
from slimtune.evaluate.generation import Reply, generate_replies
from slimtune.evaluate.likelihood import PromptWithAnswer, answer_losses, answered_ids
from slimtune.evaluate.tasks import BETWEEN_SHOTS, Question, Task, answered, prompt

OnReplies = Callable[[dict[int, Reply]], None]


@dataclass(frozen=True)
class ShotQuestion:
    """A question with the examples in front of it."""

    question: Question
    shots: list[Question]


@dataclass(frozen=True)
class FittedQuestions:
    """Questions that fit into the model's positions.

    Attributes:
        dropped: the number of questions that don't fit.
        shortened: the number of questions with fewer examples in front than wanted.
    """

    questions: list[ShotQuestion]
    dropped: int
    shortened: int


@dataclass(frozen=True)
class Prompter:
    """A model that answers the questions of a task."""

    model: Any
    tokenizer: Any
    task: Task
    batch_size: int

    def prompt(self, one: ShotQuestion) -> str:
        """The text that the model continues."""
        return prompt(self.tokenizer, one.question, one.shots, self.task.instruction)

    def tokens(self, answer: str) -> int:
        """How many tokens an answer has by itself, its end of turn included."""
        return len(self.tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1

    def fit(
        self, questions: Sequence[Question], shots: Sequence[list[Question]], most: int, drop: bool
    ) -> FittedQuestions:
        """Leave out the first examples, and with `drop` whole questions, that don't fit into the model's positions.

        Args:
            most: tokens that the answer may have.

        Raises:
            DataError: a question doesn't fit and isn't to be dropped, or none fits.
        """
        room = longest_input(self.model, self.tokenizer, None) - _virtual_tokens(self.model)
        # Its answer has positions of its own, in the decoder.
        limit = room if self.model.config.is_encoder_decoder else room - most
        fitted, lengths, shortened = [], [], 0
        for question, examples in zip(questions, shots, strict=True):
            chosen = list(examples)
            while (length := self._length(ShotQuestion(question, chosen))) > limit and chosen:
                # The first one goes: with "similar" picks it is the least alike.
                chosen.pop(0)
            shortened += len(chosen) < len(examples)
            fitted.append(ShotQuestion(question, chosen))
            lengths.append(length)
        over = sum(length > limit for length in lengths)
        if over and not drop:
            raise DataError(
                f"{over} of {len(fitted)} questions don't fit: the longest has {max(lengths)} tokens, and together "
                f"with {most} for the answer the model has positions for {room}; lower --max-new-tokens, or pass "
                f"--too-long drop"
            )
        if over == len(fitted):
            raise DataError(f"none of {over} questions fits into the model's {room} positions; lower --max-new-tokens")
        kept = [one for one, length in zip(fitted, lengths, strict=True) if length <= limit]
        return FittedQuestions(kept, over, shortened)

    def generate(
        self, questions: Sequence[ShotQuestion], most: int, known: Mapping[int, Reply], on_batch: OnReplies
    ) -> list[Reply]:
        """The answers to all questions, of which those that aren't `known` are generated."""
        left = [number for number in range(len(questions)) if number not in known]
        # Text without turns has no end: the model would go on with a question of its own.
        is_text = not has_template(self.tokenizer) and any(questions[number].shots for number in left)

        def renumbered(batch: dict[int, Reply]) -> None:
            on_batch({left[index]: reply for index, reply in batch.items()})

        replies = dict(known)
        if left:
            written = generate_replies(
                self.model, self.tokenizer, [self.prompt(questions[number]) for number in left], most,
                batch_size=self.batch_size, on_batch=renumbered, stop=BETWEEN_SHOTS if is_text else None,
            )  # fmt: skip
            replies |= dict(zip(left, written, strict=True))
        return [replies[number] for number in range(len(questions))]

    def losses(self, questions: Sequence[ShotQuestion]) -> list[tuple[float, int]]:
        """The loss of each expected answer in nats, and over how many tokens."""
        rows = [self._answered(one, one.question.expected) for one in questions]
        summed = answer_losses(self.model, self.tokenizer, rows, self.batch_size)
        return [(loss, len(row.answer)) for loss, row in zip(summed, rows, strict=True)]

    def classify(
        self, questions: Sequence[ShotQuestion], on_batch: OnReplies
    ) -> tuple[list[Reply], list[tuple[float, int]]]:
        """The likeliest label for each question, and the loss of the expected one with its tokens."""
        labels, replies, losses = self.task.labels, [], []
        for start in range(0, len(questions), self.batch_size):
            chunk = questions[start : start + self.batch_size]
            # (questions x labels) rows at once: what they all begin with, shots above all, is then read once.
            rows = [self._answered(one, label) for one in chunk for label in labels]
            flat = answer_losses(self.model, self.tokenizer, rows, self.batch_size)
            for index, one in enumerate(chunk):
                of_labels = flat[index * len(labels) : (index + 1) * len(labels)]
                expected = labels.index(one.question.expected)
                replies.append(Reply(labels[of_labels.index(min(of_labels))], ended=True))
                losses.append((of_labels[expected], len(rows[index * len(labels) + expected].answer)))
            on_batch(dict(enumerate(replies[start:], start)))
        return replies, losses

    def _length(self, one: ShotQuestion) -> int:
        return len(prompt_ids(self.tokenizer, self.prompt(one)))

    def _answered(self, one: ShotQuestion, answer: str) -> PromptWithAnswer:
        text, begin = answered(self.tokenizer, one.question, one.shots, self.task.instruction, answer)
        return answered_ids(self.model, self.tokenizer, text, begin)


def _virtual_tokens(model: Any) -> int:
    """How many positions the active soft prompts take."""
    configs = getattr(model, "peft_config", {}).values()
    return max((getattr(config, "num_virtual_tokens", None) or 0 for config in configs), default=0)
