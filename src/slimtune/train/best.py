"""The best weights of a run by a score of its evaluations, and when to stop waiting for better ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from slimtune.errors import TrainingError, did_you_mean, listing

LOWER_IS_BETTER = ("loss", "perplexity")


class Best(TrainerCallback):
    """Has a checkpoint written at each evaluation that is better than all before.

    Args:
        by: the score, as the evaluation names it without `eval_`; None keeps nothing.
        patience: stop after so many evaluations that weren't better.
    """

    def __init__(self, by: str | None, patience: int | None) -> None:
        self.by, self.patience = by, patience
        self.step: int | None = None
        self.value: float | None = None
        self.waited = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether no better score came for too long."""
        return self.patience is not None and self.waited >= self.patience

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"step": self.step, "value": self.value, "waited": self.waited}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on from what `facts` gave."""
        self.step, self.value, self.waited = facts["step"], facts["value"], facts["waited"]

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Compare; raises TrainingError if the evaluation gives no such score."""
        if self.by is None:
            return
        given = metrics or {}
        if f"eval_{self.by}" not in given:
            scores = [n for n in given if n.startswith("eval_") and not n.endswith(("_second", "_runtime"))]
            names = [name.removeprefix("eval_") for name in scores]
            near = did_you_mean(self.by, names)
            raise TrainingError(f"keep_best asks for '{self.by}', and the evaluation gives {listing(names)}{near}")
        value = float(given[f"eval_{self.by}"])
        if self._is_better(value):
            self.step, self.value, self.waited = state.global_step, value, 0
            control.should_save = True
            return
        self.waited += 1
        if self.is_exhausted:
            control.should_training_stop = control.should_save = True

    def _is_better(self, value: float) -> bool:
        if self.value is None:
            return value == value  # A number that is none is not the best.
        return value < self.value if self.by in LOWER_IS_BETTER else value > self.value
