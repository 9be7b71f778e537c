"""What scaling gives back and costs: losses and scores of the base, of the tuned model and of the scaled one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimtune.console.progress import Watch
from slimtune.evaluate.forgetting import MAX_LENGTH, Forgetting, all_passages, compare
from slimtune.evaluate.language_loss import Passage, Text, has_language_loss, losses
from slimtune.evaluate.result import Evaluation
from slimtune.evaluate.run import PreparedTask, evaluate
from slimtune.metrics.intervals import bootstrap


@dataclass(frozen=True)
class Yardsticks:
    """What the models are measured on.

    Attributes:
        outside: texts of other domains, for forgetting.
        task: texts like those that were learned, for the loss that the change costs.
        questions: of the task, for the score that it costs.
    """

    outside: Mapping[str, Sequence[Text]]
    task: Mapping[str, Sequence[Text]] = field(default_factory=dict)
    questions: PreparedTask | None = None


@dataclass(frozen=True)
class LossTradeOff:
    """The losses of three models on the same texts, in nats per token.

    Attributes:
        tuned: from the base to the tuned model.
        scaled: from the base to the scaled one.
        change: from the tuned model to the scaled one.
    """

    tuned: Forgetting
    scaled: Forgetting
    change: Forgetting

    @classmethod
    def of(cls, read: Sequence[Passage], base: np.ndarray, tuned: np.ndarray, scaled: np.ndarray) -> LossTradeOff:
        """From the summed losses of each passage."""
        return cls(*(compare(read, one, two, worst=0) for one, two in ((base, tuned), (base, scaled), (tuned, scaled))))

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {name: getattr(self, name).to_dict() for name in ("tuned", "scaled", "change")}


@dataclass(frozen=True)
class ScoreChange:
    """The score of a task's questions, of the tuned model and of the scaled one.

    Attributes:
        interval: of 95%, of the change, by a paired bootstrap over the questions.
    """

    metric: str
    count: int
    tuned: float
    scaled: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, tuned: Evaluation, scaled: Evaluation) -> ScoreChange:
        """From two evaluations of the same questions."""
        name = tuned.metric
        pairs = zip(tuned.answers, scaled.answers, strict=True)
        # Differences question by question: both models fail at the hard ones, and that common part cancels.
        changes_N = np.array([after.scores[name] - before.scores[name] for before, after in pairs])
        interval = bootstrap(lambda chosen: float(changes_N[chosen].mean()), len(changes_N))
        return cls(name, len(changes_N), tuned.scores[name], scaled.scores[name], interval)


class Measurements:
    """Taken of the base and the tuned model first, then of the scaled one.

    A model without a language loss has no losses here, and its questions are not asked.
    """

    def __init__(self, model: Any, tokenizer: Any, yardsticks: Yardsticks, watch: Watch) -> None:
        self.tokenizer, self.watch = tokenizer, watch
        known = has_language_loss(model)
        self.outside = all_passages(yardsticks.outside, tokenizer, MAX_LENGTH) if known else []
        self.task = all_passages(yardsticks.task, tokenizer, MAX_LENGTH) if known and yardsticks.task else []
        self.questions = yardsticks.questions if known else None
        self.losses: dict[str, np.ndarray] = {}
        self.answers: dict[str, Evaluation] = {}

    def read(self, name: str, model: Any) -> None:
        """The losses of a model, known by this name from now on."""
        texts = self.outside + self.task
        if texts:
            self.watch.start(f"reading tokens, {name}", sum(len(one.encoded.input_ids) for one in texts))
            # (passages,) of summed losses, outside and task behind each other: one pass over the model for both.
            self.losses[name] = losses(model, self.tokenizer, texts, on_batch=self.watch.step).numpy()

    def ask(self, name: str, model: Any) -> None:
        """The score of a model, known by this name from now on."""
        if self.questions is None:
            return
        self.watch.start(f"asking questions, {name}", len(self.questions.questions))
        done = 0

        def progress(count: int, total: int) -> None:
            nonlocal done
            # The callback counts from the start, the watch adds up.
            self.watch.step(count - done)
            done = count

        self.answers[name] = evaluate(model, self.tokenizer, self.questions, progress)

    def on_outside(self) -> LossTradeOff | None:
        """The losses on texts of other domains."""
        return self._trade(self.outside, slice(0, len(self.outside)))

    def on_task(self) -> LossTradeOff | None:
        """The losses on texts of the task."""
        return self._trade(self.task, slice(len(self.outside), None))

    def _trade(self, read: list[Passage], own: slice) -> LossTradeOff | None:
        return (
            LossTradeOff.of(read, *(self.losses[name][own] for name in ("base", "tuned", "scaled"))) if read else None
        )

    def answered(self) -> ScoreChange | None:
        """The scores, where questions were asked."""
        return ScoreChange.of(self.answers["tuned"], self.answers["scaled"]) if self.answers else None
