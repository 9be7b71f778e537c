"""The score of a model on a task: ask, score, summarise."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slimtune.errors import ConfigError, DataError
from slimtune.evaluate.answers import AnswerFile
from slimtune.evaluate.generation import Reply
from slimtune.evaluate.in_context import Contexts, Shots, contexts
from slimtune.evaluate.prompting import Asked, Asking, Fitted
from slimtune.evaluate.result import Evaluation, Scored, summarised
from slimtune.evaluate.scorers import CHOICE, Scorer, find_scorers
from slimtune.evaluate.settings import EvaluationSettings
from slimtune.evaluate.tasks import Question, Task, with_labels

Progress = Callable[[int, int], None]
"""Is told how many questions are answered, and how many there are."""


@dataclass(frozen=True)
class Prepared:
    """All of an evaluation that needs no model: the questions, the examples in front of each, the scorers."""

    task: Task
    questions: list[Question]
    settings: EvaluationSettings
    shots: Shots
    drawn: Contexts
    scorers: list[Scorer]

    @property
    def chooses(self) -> bool:
        """Whether the model chooses a label instead of writing."""
        return self.scorers[0].name == CHOICE


def prepare(
    task: Task,
    settings: EvaluationSettings | None = None,
    shots: Shots | None = None,
    examples: Task | None = None,
) -> Prepared:
    """Find scorers and examples.

    Args:
        examples: where `shots` are taken from.

    Raises:
        ConfigError: an unknown scorer, shots without examples, a longest answer where none is written.
        DataError: there are fewer examples than shots, or nothing to choose between.
    """
    settings, shots = settings or EvaluationSettings(), shots or Shots()
    scorers = find_scorers(settings.scorer, task)
    chooses = scorers[0].name == CHOICE
    if chooses and settings.max_new_tokens is not None:
        raise ConfigError("max_new_tokens would change nothing where the likeliest label is taken; leave it out")
    task = _with_all_labels(task, examples, chooses)
    questions = task.questions[: settings.limit]
    return Prepared(task, questions, settings, shots, contexts(task, questions, examples, shots), scorers)


def evaluate(
    model: Any,
    tokenizer: Any,
    prepared: Prepared | Task,
    progress: Progress | None = None,
    answers: AnswerFile | None = None,
) -> Evaluation:
    """Ask a model that writes text all questions, greedily, and score its answers.

    Where the task has labels, the answer is the label that the model finds likeliest: the one whose tokens, end of
    turn included, have the greatest sum of log p. That is the probability of saying this label and no more, so labels
    of different length need no other normalisation.

    Args:
        prepared: what `prepare` made, or a task that is asked outright.
        answers: a file for the answers, with which an evaluation that broke off goes on.

    Raises:
        ConfigError: a scorer that fails.
        DataError: a question doesn't fit into the model.
    """
    began = time.monotonic()
    if isinstance(prepared, Task):
        prepared = prepare(prepared)
    settings, chooses = prepared.settings, prepared.chooses
    asking = Asking(model, tokenizer, prepared.task, settings.batch_size)
    most = settings.max_new_tokens or longest_answer(asking, prepared.questions, chooses)
    fitted = asking.fit(prepared.questions, prepared.drawn.shots, most, drop=settings.too_long == "drop")
    known = answers.begin([asking.prompt(one) for one in fitted.asked], most) if answers and not chooses else {}
    heard = _Heard(len(fitted.asked), len(known), progress, None if chooses else answers)
    if chooses:
        replies, losses = asking.choose(fitted.asked, heard)
    else:
        replies = asking.write(fitted.asked, most, known, heard)
        losses = asking.losses(fitted.asked)
    triples = zip(fitted.asked, replies, losses, strict=True)
    scored = [_scored(one, reply, loss, prepared.scorers) for one, reply, loss in triples]
    facts = _facts(prepared, fitted) | {
        "max_new_tokens": most,
        "unfinished": sum(not reply.ended for reply in replies),
        "known": len(known),
    }
    found = summarised(scored, time.monotonic() - began, facts)
    if answers:
        answers.finish(found.answers)
    return found


def _facts(prepared: Prepared, fitted: Fitted) -> dict[str, Any]:
    shots, drawn = prepared.shots, prepared.drawn
    examples = {"by": drawn.by, "leaked": drawn.leaked, "shortened": fitted.shortened} | {
        name: getattr(shots, name) for name in ("pick", "seed", "random_labels")
    }
    return {"dropped": fitted.dropped, "shots": shots.count, "examples": examples if shots.count else None}


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
