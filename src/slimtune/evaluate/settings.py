"""How a model is asked and its answers are scored, apart from the model and the questions."""

from __future__ import annotations

from dataclasses import dataclass

from slimtune.errors import check_choice, check_whole

TOO_LONG = ("error", "drop")


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation; raises ConfigError for values that can't be.

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
        from slimtune.evaluate.scorers import check_scorer

        check_scorer(self.scorer)
        check_whole("batch_size", self.batch_size)
        for name in ("max_new_tokens", "limit"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        check_choice("too_long", self.too_long, TOO_LONG)
