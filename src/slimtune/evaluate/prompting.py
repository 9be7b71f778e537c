"""Questions put to a model that writes text: fitted into its positions, answered in batches, with their losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimtune.data.chat_template import has_template, prompt_ids
from slimtune.data.texts import longest_input
from slimtune.errors import DataError
from slimtune.evaluate.generation import Reply, generate_replies
from slimtune.evaluate.likelihood import Answered, answer_losses, answered_ids
from slimtune.evaluate.tasks import BETWEEN_SHOTS, Question, Task, answered, prompt

OnReplies = Callable[[dict[int, Reply]], None]


@dataclass(frozen=True)
class Asked:
    """A question and the examples that stand in front of it."""

    question: Question
    shots: list[Question]


@dataclass(frozen=True)
class Fitted:
    """Questions that fit into the model's positions.

    Attributes:
        dropped: how many questions were left out, because they don't.
        shortened: how many stand behind fewer examples than were asked for.
    """

    asked: list[Asked]
    dropped: int
    shortened: int


@dataclass(frozen=True)
class Asking:
    """A model, and the task that it is asked."""

    model: Any
    tokenizer: Any
    task: Task
    batch_size: int

    def prompt(self, asked: Asked) -> str:
        """What the model is shown."""
        return prompt(self.tokenizer, asked.question, asked.shots, self.task.instruction)

    def tokens(self, answer: str) -> int:
        """How many tokens an answer has by itself, its end of turn included."""
        return len(self.tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1

    def fit(self, questions: Sequence[Question], shots: Sequence[list[Question]], most: int, drop: bool) -> Fitted:
        """Leave out the first examples, and questions if told, where prompt and answer don't fit; raises DataError."""
        room = longest_input(self.model, self.tokenizer, None) - _virtual_tokens(self.model)
        limit = room if self.model.config.is_encoder_decoder else room - most
        asked, lengths, shortened = [], [], 0
        for question, examples in zip(questions, shots, strict=True):
            chosen = list(examples)
            while (length := self._length(Asked(question, chosen))) > limit and chosen:
                chosen.pop(0)
            shortened += len(chosen) < len(examples)
            asked.append(Asked(question, chosen))
            lengths.append(length)
        over = sum(length > limit for length in lengths)
        if over and not drop:
            raise DataError(
                f"{over} of {len(asked)} questions don't fit: the longest has {max(lengths)} tokens, and together with "
                f"{most} for the answer the model has positions for {room}; lower --max-new-tokens, or pass "
                f"--too-long drop"
            )
        if over == len(asked):
            raise DataError(f"none of {over} questions fits into the model's {room} positions; lower --max-new-tokens")
        kept = [one for one, length in zip(asked, lengths, strict=True) if length <= limit]
        return Fitted(kept, over, shortened)

    def write(self, asked: Sequence[Asked], most: int, known: Mapping[int, Reply], on_batch: OnReplies) -> list[Reply]:
        """The answers that the model writes, but for those that are known already."""
        left = [number for number in range(len(asked)) if number not in known]
        # Text without turns has no end: the model would go on with a question of its own.
        is_text = not has_template(self.tokenizer) and any(asked[number].shots for number in left)

        def told(batch: dict[int, Reply]) -> None:
            on_batch({left[index]: reply for index, reply in batch.items()})

        replies = dict(known)
        if left:
            found = generate_replies(
                self.model, self.tokenizer, [self.prompt(asked[number]) for number in left], most,
                batch_size=self.batch_size, on_batch=told, stop=BETWEEN_SHOTS if is_text else None,
            )  # fmt: skip
            replies |= dict(zip(left, found, strict=True))
        return [replies[number] for number in range(len(asked))]

    def losses(self, asked: Sequence[Asked]) -> list[tuple[float, int]]:
        """The loss of each expected answer in nats, and over how many tokens."""
        rows = [self._answered(one, one.question.expected) for one in asked]
        found = answer_losses(self.model, self.tokenizer, rows, self.batch_size)
        return [(loss, len(row.answer)) for loss, row in zip(found, rows, strict=True)]

    def choose(self, asked: Sequence[Asked], on_batch: OnReplies) -> tuple[list[Reply], list[tuple[float, int]]]:
        """The likeliest label for each question, and the loss of the expected one with its tokens."""
        labels, replies, losses = self.task.labels, [], []
        for start in range(0, len(asked), self.batch_size):
            chunk = asked[start : start + self.batch_size]
            rows = [self._answered(one, label) for one in chunk for label in labels]
            flat = answer_losses(self.model, self.tokenizer, rows, self.batch_size)
            for index, one in enumerate(chunk):
                of_labels = flat[index * len(labels) : (index + 1) * len(labels)]
                expected = labels.index(one.question.expected)
                replies.append(Reply(labels[of_labels.index(min(of_labels))], ended=True))
                losses.append((of_labels[expected], len(rows[index * len(labels) + expected].answer)))
            on_batch(dict(enumerate(replies[start:], start)))
        return replies, losses

    def _length(self, asked: Asked) -> int:
        return len(prompt_ids(self.tokenizer, self.prompt(asked)))

    def _answered(self, asked: Asked, answer: str) -> Answered:
        text, begin = answered(self.tokenizer, asked.question, asked.shots, self.task.instruction, answer)
        return answered_ids(self.model, self.tokenizer, text, begin)


def _virtual_tokens(model: Any) -> int:
    """How many positions the active soft prompts take."""
    configs = getattr(model, "peft_config", {}).values()
    return max((getattr(config, "num_virtual_tokens", None) or 0 for config in configs), default=0)
