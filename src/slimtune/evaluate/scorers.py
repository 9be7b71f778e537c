"""Scores of answers: exact, as JSON, as numbers, by overlap of text, or by a function of the user's own.

`EvaluationSettings` names the scorers, and says how the answers that they score are produced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from slimtune.errors import ConfigError, check_choice, check_whole, did_you_mean, require
from slimtune.evaluate.tasks import Question, Task

AUTO, CHOICE = "auto", "accuracy"
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


TOO_LONG = ("error", "drop")


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is prompted and its answers are scored; raises ConfigError for values that can't be.

    Attributes:
        scorer: "auto" (by the kind of task), names as `evaluate.scorers` lists them, with commas between, the first one
            being the main score, or a function of the user's own as `path.py:function`.
        max_new_tokens: the longest answer in tokens; None allows twice what the longest expected answer has.
        batch_size: how many questions are answered at once.
        limit: how many questions are asked, from the first on; None asks all.
        too_long: "error", or "drop" for questions that don't fit into the model's positions together with an answer.
    """

    scorer: str = "auto"
    max_new_tokens: int | None = None
    batch_size: int = 32
    limit: int | None = None
    too_long: str = "error"

    def __post_init__(self) -> None:
        check_scorer(self.scorer)
        check_whole("batch_size", self.batch_size)
        for name in ("max_new_tokens", "limit"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        check_choice("too_long", self.too_long, TOO_LONG)


@dataclass(frozen=True)
class Scorer:
    """One way to score an answer; more is better.

    Attributes:
        score: the scores of one answer by name, the first being the main one.
    """

    name: str
    score: Callable[[str, Question], Mapping[str, float]]


def find_scorers(names: str, task: Task) -> list[Scorer]:
    """The scorers of these names, or of a task if "auto"; raises ConfigError, MissingDependencyError."""
    check_scorer(names)
    return [_scorer(name) for name in (_fitting(task) if names == AUTO else names.split(","))]


def check_scorer(names: str) -> None:
    """Raises: ConfigError, for names that no scorer has, with the nearest."""
    if not isinstance(names, str):
        raise ConfigError(f"scorer must be a name or path.py:function, found {names!r}")
    for name in names.split(","):
        # "auto" alone: as one of several it would add scorers that depend on the data.
        if name in SCORERS or ".py:" in name or (name == AUTO == names):
            continue
        known = (AUTO, *SCORERS)
        raise ConfigError(
            f"no scorer '{name}'; pass one of {', '.join(known)}, or a function of your own as path.py:function"
            f"{did_you_mean(name, known)}"
        )
    if CHOICE in names.split(",") and names != CHOICE:
        raise ConfigError(f"the scorer '{CHOICE}' lets the model choose a label instead of writing; pass it alone")


def _fitting(task: Task) -> tuple[str, ...]:
    if task.labels:
        # From the most particular kind of answer to text; a task of one label each would also be a task of text.
        return (CHOICE,)
    if any(question.entry is not None for question in task.questions):
        return ("reasoning_gym",)
    if all(isinstance(_parsed(question.expected), dict | list) for question in task.questions):
        return ("json", "exact_match")
    if all(_as_number(question.expected) is not None for question in task.questions):
        return ("number", "exact_match")
    return ("exact_match",)


def _scorer(name: str) -> Scorer:
    if ".py:" in name:
        from slimtune.evaluate.user_scorer import load_scorer

        return Scorer(name, load_scorer(name))
    return Scorer(name, SCORERS[name]())


def _exact_match() -> Callable[[str, Question], dict[str, float]]:
    return lambda answer, question: {"exact_match": float(answer.strip() == question.expected.strip())}


def _choice() -> Callable[[str, Question], dict[str, float]]:
    return lambda answer, question: {CHOICE: float(answer == question.expected)}


def _json_match() -> Callable[[str, Question], dict[str, float]]:
    def score(answer: str, question: Question) -> dict[str, float]:
        expected = _parsed(question.expected)
        if expected is _BROKEN:
            raise ConfigError(
                f"the scorer 'json' needs expected answers that are JSON, found {question.expected!r}; choose another"
            )
        parsed = _parsed(answer)
        return {"json_match": float(_alike(parsed, expected)), "json_valid": float(parsed is not _BROKEN)}

    return score


def _number_match() -> Callable[[str, Question], dict[str, float]]:
    def score(answer: str, question: Question) -> dict[str, float]:
        expected = _last_number(question.expected)
        if expected is None:
            raise ConfigError(
                f"the scorer 'number' needs a number in each expected answer, found {question.expected!r}; "
                f"choose another"
            )
        return {"number_match": float(_last_number(answer) == expected)}

    return score


def _rouge() -> Callable[[str, Question], dict[str, float]]:
    require("rouge-score", extra="evaluate", purpose="the scorer 'rouge'")
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rougeL", "rouge1", "rouge2"]
    scorer = RougeScorer(kinds)

    def score(answer: str, question: Question) -> dict[str, float]:
        measured = scorer.score(question.expected, answer)
        return {kind: measured[kind].fmeasure for kind in kinds}

    return score


def _chrf() -> Callable[[str, Question], dict[str, float]]:
    require("sacrebleu", extra="evaluate", purpose="the scorer 'chrf'")
    from sacrebleu.metrics.chrf import CHRF

    scorer = CHRF()
    # From 0 to 1 as all others here; sacrebleu counts to 100.
    return lambda answer, question: {"chrf": scorer.sentence_score(answer, [question.expected]).score / 100}


def _reasoning_gym() -> Callable[[str, Question], dict[str, float]]:
    from slimtune.evaluate.tasks import score_entry

    return lambda answer, question: {"reasoning_gym": score_entry(answer, question)}


SCORERS: dict[str, Callable[[], Callable[[str, Question], Mapping[str, float]]]] = {
    "exact_match": _exact_match,
    CHOICE: _choice,
    "json": _json_match,
    "number": _number_match,
    "rouge": _rouge,
    "chrf": _chrf,
    "reasoning_gym": _reasoning_gym,
}


_BROKEN = object()
"""In place of a value: what is no JSON."""


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    # Thousands of opening brackets, which a small model writes when it is stuck, exhaust the parser's stack.
    except (ValueError, RecursionError):
        return _BROKEN


def _alike(parsed: Any, expected: Any) -> bool:
    """Whether two values of JSON are the same; in Python, true equals 1."""
    return parsed is not _BROKEN and json.dumps(parsed, sort_keys=True) == json.dumps(expected, sort_keys=True)


def _last_number(text: str) -> Decimal | None:
    """The last number in a text, where an answer that reasons first ends."""
    # With thousands' commas and exponents, without units: "$1,250.00" is found as 1,250.00.
    numbers = _NUMBER.findall(text)
    return _as_number(numbers[-1]) if numbers else None


def _as_number(text: str) -> Decimal | None:
    try:
        # Decimal: 0.1 is 0.10 and 1e3 is 1000, while floats would also call 0.1 + 2e-17 equal.
        number = Decimal(text.strip().replace(",", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
