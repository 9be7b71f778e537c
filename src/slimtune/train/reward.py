"""What judges an answer in GRPO: exact match with the answer that is in the data, or a function of the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slimtune.errors import ConfigError, TrainingError, did_you_mean
from slimtune.evaluate.user_scorer import function_of
from slimtune.recipe.preference import EXACT_MATCH


class Reward:
    """A reward as TRL calls it; the function sees texts: `f(prompts=[...], completions=[...], column=[...], ...)`."""

    def __init__(self, name: str, function: Callable[..., Sequence[float]]) -> None:
        self.__name__ = name
        self.function = function

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        """A number for each completion; raises TrainingError for anything else."""
        for internal in ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments"):
            columns.pop(internal, None)
        texts = [_text(completion) for completion in completions]
        found = self.function(prompts=[_text(prompt) for prompt in prompts], completions=texts, **columns)
        try:
            rewards = [float(value) for value in found]
        except (TypeError, ValueError) as error:
            problem = f"the reward '{self.__name__}' gave no list of numbers ({error})"
            raise TrainingError(f"{problem}; return one for each answer") from error
        if len(rewards) != len(texts) or not all(map(math.isfinite, rewards)):
            shown = ", ".join(map(str, rewards[:4]))
            raise TrainingError(
                f"the reward '{self.__name__}' gave {len(rewards)} numbers ({shown}, ...) for {len(texts)} answers; "
                f"return one finite number for each"
            )
        return rewards


def reward_of(name: str) -> Reward:
    """The reward "exact-match", or a function of a file, `path.py:function`; raises ConfigError."""
    if name == EXACT_MATCH:
        return Reward("exact_match", exact_match)
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        near = did_you_mean(name, [EXACT_MATCH])
        raise ConfigError(f"no reward '{name}'; pass {EXACT_MATCH}, or path.py:function{near}")
    return Reward(function, function_of(Path(path), function, "reward"))


def exact_match(completions: Sequence[str], **columns: Any) -> list[float]:
    """1 where the completion is the row's `answer` (or `completion`), white space around it aside, else 0."""
    expected = columns.get("answer", columns.get("completion"))
    if expected is None:
        raise ConfigError(f"the reward {EXACT_MATCH} needs the field answer in each row of the data; add it")
    return [float(said.strip() == str(right).strip()) for said, right in zip(completions, expected, strict=True)]


def _text(said: Any) -> str:
    """A text, or the messages of a conversation, as text."""
    return said if isinstance(said, str) else "\n".join(message["content"] for message in said)
