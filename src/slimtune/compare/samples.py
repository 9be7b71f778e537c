"""Answers side by side: the same questions, all arms, the first seed of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pvariance

from slimtune.compare.results import Question, Score
from slimtune.compare.summary import Summary

FIRST, DIVIDED = 3, 3
"""How many questions are shown because they come first, and because the arms differ on them most."""


@dataclass(frozen=True)
class Answer:
    """What one arm or several said alike, and its score."""

    arms: tuple[str, ...]
    text: str
    score: float


@dataclass(frozen=True)
class Sample:
    """A question with the answers of all arms."""

    number: int
    question: Question
    answers: tuple[Answer, ...]
    why: str


def samples(summary: Summary, questions: Sequence[Question]) -> list[Sample]:
    """The first questions, so that nobody chose them, and those on which the arms differ most."""
    scored = [(row.name, score) for row in summary.rows if row.done and (score := row.done[0].score)]
    if not scored:
        return []
    count = min(len(questions), len(scored[0][1].per_question))
    first = list(range(min(FIRST, count)))
    divided = sorted(range(len(first), count), key=lambda index: -_apart(summary, index))[:DIVIDED]
    told = [(index, "from the start") for index in first]
    told += [(index, "the arms differ") for index in divided if _apart(summary, index) > 0]
    return [Sample(index + 1, questions[index], _answers(scored, index), why) for index, why in told]


def _answers(scored: Sequence[tuple[str, Score]], index: int) -> tuple[Answer, ...]:
    """Arms that said the same stand together, in the order of the first of them."""
    said: dict[tuple[str, float], list[str]] = {}
    for name, score in scored:
        said.setdefault((score.answers[index], score.per_question[index]), []).append(name)
    return tuple(Answer(tuple(names), text, score) for (text, score), names in said.items())


def _apart(summary: Summary, index: int) -> float:
    """The variance between the arms' means on one question."""
    return pvariance([fmean(r.score.per_question[index] for r in row.done if r.score) for row in summary.scored])
