"""The score of a model on a task: prompt, score, summarise."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slimtune.errors import ConfigError, DataError
from slimtune.evaluate.answers import AnswerFile
from slimtune.evaluate.generation import Reply
from slimtune.evaluate.in_context import DrawnShots, Shots, draw_shots
from slimtune.evaluate.prompting import FittedQuestions, Prompter, ShotQuestion
from slimtune.evaluate.result import Evaluation, ScoredAnswer, summarised
from slimtune.evaluate.scorers import CHOICE, EvaluationSettings, Scorer, find_scorers
from slimtune.evaluate.tasks import Question, Task, with_labels

Progress = Callable[[int, int], None]
"""Called with the number of questions answered so far, and of all questions."""


@dataclass(frozen=True)
class PreparedTask:
    """All of an evaluation that needs no model: the questions, the examples in front of each, the scorers."""

    task: Task
    questions: list[Question]
    settings: EvaluationSettings
    shots: Shots
    drawn: DrawnShots
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
) -> PreparedTask:
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
    # After the labels: they are those of the whole task, or a limit would make the choice easier.
    questions = task.questions[: settings.limit]
    return PreparedTask(task, questions, settings, shots, draw_shots(task, questions, examples, shots), scorers)


def evaluate(
    model: Any,
    tokenizer: Any,
    prepared: PreparedTask | Task,
    progress: Progress | None = None,
    answers: AnswerFile | None = None,
) -> Evaluation:
    """Ask a model that writes text all questions, greedily, and score its answers.

    Where the task has labels, the answer is the label that the model finds likeliest: the one whose tokens, end of
    turn included, have the greatest sum of log p. That is the probability of saying this label and no more, so labels
    of different length need no other normalisation.

    Args:
        prepared: what `prepare` made, or a task, asked without examples.
        answers: a file for the answers, with which an evaluation that broke off goes on.

    Raises:
        ConfigError: a scorer that fails.
        DataError: a question doesn't fit into the model.
    """
    began = time.monotonic()
    if isinstance(prepared, Task):
        prepared = prepare(prepared)
    settings, chooses = prepared.settings, prepared.chooses
    prompter = Prompter(model, tokenizer, prepared.task, settings.batch_size)
    most = settings.max_new_tokens or longest_answer(prompter, prepared.questions, chooses)
    fitted = prompter.fit(prepared.questions, prepared.drawn.shots, most, drop=settings.too_long == "drop")
    # Answers are told apart by prompt and limit: with another template or more shots they are answers to another
    # question.
    known = answers.begin([prompter.prompt(one) for one in fitted.questions], most) if answers and not chooses else {}
    relay = _ProgressRelay(len(fitted.questions), len(known), progress, None if chooses else answers)
    if chooses:
        replies, losses = prompter.classify(fitted.questions, relay)
    else:
        replies = prompter.generate(fitted.questions, most, known, relay)
        losses = prompter.losses(fitted.questions)
    triples = zip(fitted.questions, replies, losses, strict=True)
    scored = [_scored(one, reply, loss, prepared.scorers) for one, reply, loss in triples]
    facts = _facts(prepared, fitted) | {
        "max_new_tokens": most,
        "unfinished": sum(not reply.ended for reply in replies),
        "known": len(known),
    }
    evaluation = summarised(scored, time.monotonic() - began, facts)
    if answers:
        answers.finish(evaluation.answers)
    return evaluation


def _facts(prepared: PreparedTask, fitted: FittedQuestions) -> dict[str, Any]:
    shots, drawn = prepared.shots, prepared.drawn
    examples = {"by": drawn.by, "leaked": drawn.leaked, "shortened": fitted.shortened} | {
        name: getattr(shots, name) for name in ("pick", "seed", "random_labels")
    }
    return {"dropped": fitted.dropped, "shots": shots.count, "examples": examples if shots.count else None}


def longest_answer(prompter: Prompter, questions: Sequence[Question], chooses: bool = False) -> int:
    """The default limit of an answer in tokens: twice the longest expected one, 16 at least."""
    if chooses:
        return max(map(prompter.tokens, prompter.task.labels))
    # Room for an answer that is worded otherwise; a limit at the longest expected one would cut good answers off.
    return max(16, 2 * max(prompter.tokens(question.expected) for question in questions))


class _ProgressRelay:
    """Passes the answers of each batch on to the file and to the progress callback."""

    def __init__(self, count: int, known: int, progress: Progress | None, answers: AnswerFile | None) -> None:
        self.count, self.done, self.progress, self.answers = count, known, progress, answers

    def __call__(self, batch: dict[int, Reply]) -> None:
        self.done += len(batch)
        if self.answers:
            self.answers.add(batch)
        if self.progress:
            self.progress(self.done, self.count)


def _scored(one: ShotQuestion, reply: Reply, loss: tuple[float, int], scorers: Sequence[Scorer]) -> ScoredAnswer:
    scores: dict[str, float] = {}
    for scorer in scorers:
        scores |= scorer.score(reply.text, one.question)
    return ScoredAnswer(one.question, reply.text, scores, *loss, reply.ended, len(one.shots))


def _with_all_labels(task: Task, examples: Task | None, chooses: bool) -> Task:
    """The task with the labels of its examples, too; of the answers, where a task of text is taken as one of labels."""
    if task.labels:
        labels = sorted({*task.labels, *(examples.labels if examples else ())})
        task = with_labels(task, labels)
    elif chooses:
        questions = [*task.questions, *(examples.questions if examples else ())]
        task = replace(task, labels=sorted({question.expected for question in questions}))
        # Labels repeat. Where most answers are seen once it is free text, and choosing among all of it would measure
        # nothing.
        if 2 * len(task.labels) > len(questions):
            raise DataError(
                f"the scorer '{CHOICE}' chooses among labels, but {len(questions)} questions have "
                f"{len(task.labels)} different answers; choose another scorer, such as exact_match"
            )
    if chooses and len(task.labels) < 2:
        raise DataError(f"all questions of {task.source} have the answer {task.labels[0]!r}, so there is no choice")
    return task
