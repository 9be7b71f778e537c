"""The share of questions that are answered exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from slimtune.data.chat_template import Message, render
from slimtune.evaluate.generation import generate_batch


class Checkable(Protocol):
    """A question that knows its answer."""

    def is_answered_by(self, answer: str) -> bool:
        """Whether the answer is exactly right."""
        ...


@dataclass(frozen=True)
class ExactMatch:
    """How many answers were exactly right, and the answers."""

    right: int
    answers: list[str]

    @property
    def share(self) -> float:
        """The share of exactly right answers."""
        return self.right / len(self.answers)

    def __str__(self) -> str:
        return f"{self.share:.0%} ({self.right} of {len(self.answers)})"


def exact_match(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Checkable],
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int = 64,
) -> ExactMatch:
    """Ask each conversation greedily and count the examples that are answered exactly."""
    prompts = [render(tokenizer, conversation, for_answer=True) for conversation in conversations]
    return judged(examples, generate_batch(model, tokenizer, prompts, max_new_tokens))


def judged(examples: Sequence[Checkable], answers: list[str]) -> ExactMatch:
    """The score of answers that are there already."""
    right = sum(example.is_answered_by(answer) for example, answer in zip(examples, answers, strict=True))
    return ExactMatch(right, answers)
