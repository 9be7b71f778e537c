"""The score of a model on a task: ask, score, summarise."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from slimtune.errors import DataError
from slimtune.evaluate.answers import AnswerFile
from slimtune.evaluate.asking import Asked, Asking
from slimtune.evaluate.generation import Reply
from slimtune.evaluate.in_context import Shots, contexts
from slimtune.evaluate.result import Evaluation, Scored, summarised
from slimtune.evaluate.scorers import CHOICE, Scorer, find_scorers
from slimtune.evaluate.settings import EvaluationSettings
from slimtune.evaluate.tasks import Question, Task, with_labels

Progress = Callable[[int, int], None]
"""Is told how many questions are answered, and how many there are."""


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    settings: EvaluationSettings | None = None,
    shots: Shots | None = None,
    examples: Task | None = None,
    progress: Progress | None = None,
    answers: AnswerFile | None = None,
) -> Evaluation:
    """Ask a model that writes text all questions of a task, greedily, and score its answers.

    Where the task has labels, the answer is the label that the model finds likeliest: the one whose tokens, end of
    turn included, have the greatest sum of log p. That is the probability of saying this label and no more, so labels
    of different length need no other normalisation.

    Args:
        examples: where `shots` are taken from.
        answers: a file for the answers, with which an evaluation that broke off goes on.

    Raises:
        ConfigError: an unknown scorer, a scorer that fails, shots without examples.
        DataError: a question doesn't fit into the model, or there are fewer examples than shots.
    """
    settings, shots, began = settings or EvaluationSettings(), shots or Shots(), time.monotonic()
    scorers = find_scorers(settings.scorer, task)
    chooses = scorers[0].name == CHOICE
    task = _with_all_labels(task, examples, chooses)
    questions = task.questions[: settings.limit]
    drawn = contexts(task, questions, examples, shots)
    asking = Asking(model, tokenizer, task, settings.batch_size)
    most = settings.max_new_tokens or longest_answer(asking, questions, chooses)
    fitted = asking.fit(questions, drawn.shots, most, drop=settings.too_long == "drop")
    known = answers.begin([asking.prompt(one) for one in fitted.asked], most) if answers and not chooses else {}
    heard = _Heard(len(fitted.asked), len(known), progress, None if chooses else answers)
    if chooses:
        replies, losses = asking.choose(fitted.asked, heard)
    else:
        replies = asking.write(fitted.asked, most, known, heard)
        losses = asking.losses(fitted.asked)
    scored = [
        _scored(one, reply, loss, scorers) for one, reply, loss in zip(fitted.asked, replies, losses, strict=True)
    ]
    facts = {
        "max_new_tokens": most,
        "unfinished": sum(not reply.ended for reply in replies),
        "dropped": fitted.dropped,
        "shots": shots.count,
        "examples": {"by": drawn.by, "leaked": drawn.leaked, "shortened": fitted.shortened} if shots.count else None,
        "known": len(known),
    }
    found = summarised(scored, time.monotonic() - began, facts)
    if answers:
        answers.finish(found.answers)
    return found


def longest_answer(asking: Asking, questions: Sequence[Question], chooses: bool = False) -> int:
    """The tokens that an answer may have unless told: twice those of the longest expected one, 16 at least."""
    if chooses:
        return max(map(asking.tokens, asking.task.labels))
    return max(16, 2 * max(asking.tokens(question.expected) for question in questions))


class _Heard:
    """Passes the answers of each batch on, to the file and to whoever watches."""

    def __init__(self, count: int, known: int, progress: Progress | None, answers: AnswerFile | None) -> None:
        self.count, self.done, self.progress, self.answers = count, known, progress, answers

    def __call__(self, batch: dict[int, Reply]) -> None:
        self.done += len(batch)
        if self.answers:
            self.answers.add(batch)
        if self.progress:
            self.progress(self.done, self.count)


def _scored(asked: Asked, reply: Reply, loss: tuple[float, int], scorers: Sequence[Scorer]) -> Scored:
    scores: dict[str, float] = {}
    for scorer in scorers:
        scores |= scorer.score(reply.text, asked.question)
    return Scored(asked.question, reply.text, scores, *loss, reply.ended, len(asked.shots))


def _with_all_labels(task: Task, examples: Task | None, chooses: bool) -> Task:
    """The task with the labels of its examples, too; of the answers, where a task of text is taken as one of labels."""
    if task.labels:
        labels = sorted({*task.labels, *(examples.labels if examples else ())})
        task = with_labels(task, labels)
    elif chooses:
        questions = [*task.questions, *(examples.questions if examples else ())]
        task = replace(task, labels=sorted({question.expected for question in questions}))
        if 2 * len(task.labels) > len(questions):
            raise DataError(
                f"the scorer '{CHOICE}' chooses among labels, but {len(questions)} questions have "
                f"{len(task.labels)} different answers; choose another scorer, such as exact_match"
            )
    if chooses and len(task.labels) < 2:
        raise DataError(f"all questions of {task.source} have the answer {task.labels[0]!r}, so there is no choice")
    return task
