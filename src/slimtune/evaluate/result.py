"""What an evaluation found: scores with intervals, the loss of the expected answers, and every answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from slimtune.data.tasks.word_alignment import OUTSIDE
from slimtune.errors import counted
from slimtune.evaluate.scorers import CHOICE
from slimtune.evaluate.tasks import Question
from slimtune.metrics.classification import scores as label_scores
from slimtune.metrics.intervals import interval_of_mean, interval_of_share
from slimtune.metrics.tagging import MACRO_F1


class Answer(Protocol):
    """One answer of an evaluation."""

    @property
    def scores(self) -> dict[str, float]:
        """By name."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """One line of the answers' file."""
        ...


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer and its scores.

    Attributes:
        scores: by name, the main one first; more is better.
        loss: of the expected answer in nats, -sum log p(token).
        tokens: that the expected answer has, its end of turn included.
        ended: whether the model ended its answer before it had as many tokens as it may.
        shots: how many examples stood in front of the question.
    """

    question: Question
    answer: str
    scores: dict[str, float]
    loss: float
    tokens: int
    ended: bool = True
    shots: int = 0

    def to_dict(self) -> dict[str, Any]:
        """One line of the answers' file."""
        question = self.question.turns if self.question.text is None else self.question.text
        main = next(iter(self.scores.values()))
        line = {"question": question, "answer": self.answer, "expected": self.question.expected, "score": main}
        return line | {"scores": self.scores, "loss": self.loss, "tokens": self.tokens, "ended": self.ended}


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model on a task.

    Attributes:
        metric: the name of the main score.
        scores: means over the questions, or over all of them at once (macro F1), between 0 and 1 unless the scorer is
            the user's own.
        intervals: of 95%, by Wilson's formula for shares, else by bootstrap over the questions, where there is one.
        loss: in nats, over all that `loss_of` names; None where it wasn't told.
        perplexity: exp(loss), where the loss is of tokens.
        facts: what else there is to know: how many were dropped, cut off, left out.
        unit: what was counted: questions, texts.
        loss_of: what the loss is the mean over: tokens of the expected answers, or what has one label.
    """

    metric: str
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    loss: float | None
    perplexity: float | None
    answers: Sequence[Answer]
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    unit: str = "questions"
    loss_of: str = "token of the expected answers"

    @property
    def score(self) -> float:
        """The main score."""
        return self.scores[self.metric]

    @property
    def count(self) -> int:
        """How many questions were asked."""
        return self.facts.get("count", len(self.answers))

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the answers."""
        return {
            "metric": self.metric,
            "scores": self.scores,
            "intervals": {name: list(bounds) for name, bounds in self.intervals.items()},
            "count": self.count,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "seconds": self.seconds,
            **self.facts,
        }

    def remarks(self) -> list[str]:
        """What a reader must know besides the scores, a sentence each."""
        facts, remarks = self.facts, []
        if facts.get("known"):
            remarks.append(f"{facts['known']} of the answers were there from a run that broke off")
        if facts.get("dropped"):
            remarks.append(f"{facts['dropped']} {self.unit} were dropped, because they don't fit into the model")
        if facts.get("without_token"):
            remarks.append(
                f"{facts['without_token']} words count as {OUTSIDE}, for the tokenizer makes nothing of them"
            )
        if facts.get("unfinished"):
            most = facts["max_new_tokens"]
            remarks.append(f"{counted(facts['unfinished'], 'answer')} cut off after {most} tokens (--max-new-tokens)")
        if examples := facts.get("examples"):
            remarks.append(f"{counted(facts['shots'], 'example')} in front of each question, {examples['by']}")
            if examples["leaked"]:
                remarks.append(f"{counted(examples['leaked'], 'example')} left out, because the task asks the same")
            if examples["shortened"]:
                remarks.append(
                    f"{counted(examples['shortened'], 'question')} behind fewer examples, to fit into the model"
                )
        return remarks


def summarised(
    answers: Sequence[ScoredAnswer], seconds: float, facts: dict[str, Any], of_tokens: bool = True
) -> Evaluation:
    """Scores over all answers, which all have the same names."""
    names = list(answers[0].scores)
    by_name = {name: [answer.scores[name] for answer in answers] for name in names}
    # `fsum` is exact whatever the order: a resumed run gives the same mean to the last bit.
    means = {name: math.fsum(values) / len(values) for name, values in by_name.items()}
    intervals = {name: interval_of_mean(values) for name, values in by_name.items()}
    if CHOICE in names:
        means[MACRO_F1], intervals[MACRO_F1] = _macro_f1(answers)
    # Per token over all answers together, so that a long answer counts for its length; a mean of means would favour
    # short ones.
    count = sum(answer.tokens for answer in answers) if of_tokens else len(answers)
    loss = math.fsum(answer.loss for answer in answers) / count
    perplexity = _exp(loss) if of_tokens else None
    evaluation = Evaluation(names[0], means, intervals, loss, perplexity, list(answers), seconds, facts)
    return evaluation if of_tokens else replace(evaluation, loss_of="text")


def _macro_f1(answers: Sequence[ScoredAnswer]) -> tuple[float, tuple[float, float]]:
    pairs = [(answer.answer, answer.question.expected) for answer in answers]

    def of(chosen: np.ndarray) -> float:
        # Recomputed for each draw: F1 is no mean over questions, so that there is no interval of a mean to be had.
        picked = [pairs[index] for index in chosen]
        return label_scores([answer for answer, _ in picked], [true for _, true in picked])[MACRO_F1]

    return of(np.arange(len(pairs))), interval_of_share(of, len(pairs))


def _exp(loss: float) -> float:
    # math.exp raises OverflowError from 709.8 on; a mean loss that high is a broken model, to be shown and not to crash
    # on.
    return math.exp(loss) if loss < 700 else math.inf
