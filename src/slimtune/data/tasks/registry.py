"""The tasks by name, and reading the data of a recipe for one of them."""

from __future__ import annotations

from slimtune.data.reading import read_splits
from slimtune.data.settings import DataSettings
from slimtune.data.streaming import Streamed
from slimtune.data.tasks.causal_lm import Conversations
from slimtune.data.tasks.classification import Classes
from slimtune.data.tasks.preference import Preferred
from slimtune.data.tasks.seq2seq import Completions
from slimtune.data.tasks.token_classification import Tags

Data = Conversations | Classes | Tags | Completions | Preferred


TASK_DATA = {
    "text": Conversations.of,
    "classification": Classes.of,
    "token-classification": Tags.of,
    "seq2seq": Completions.of,
    **dict.fromkeys(("dpo", "kto", "orpo", "grpo"), Preferred.of),
}
"""How the data of each task is made of rows; a new task is a file with a `TaskData` and a line here."""


def read(settings: DataSettings, task: str = "auto", seed: int = 0) -> Data:
    """The rows of a task, which is found by looking at them unless it is given; raises DataError, ConfigError."""
    if settings.streaming:
        return Streamed.open(settings, task, seed)
    splits = read_splits(settings, task, seed)
    return TASK_DATA[splits.task](splits, settings, seed)
