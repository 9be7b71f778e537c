"""From a recipe's data to what a model learns from it: the data of each task."""

from __future__ import annotations

from slimtune.data.encode import refuse_split
from slimtune.data.reading import Splits, read_splits
from slimtune.data.settings import DataSettings
from slimtune.data.streaming import Streamed
from slimtune.data.tasks.causal_lm import Conversations
from slimtune.data.tasks.classification import Classes
from slimtune.data.tasks.preference import Preferred
from slimtune.data.tasks.seq2seq import Completions
from slimtune.data.tasks.token_classification import Tags

Data = Conversations | Classes | Tags | Completions | Preferred


def _texts(splits: Splits, settings: DataSettings, seed: int = 0) -> Conversations:
    refuse_split([row for source in (*splits.train, *splits.held_out) for row in source.rows], settings.too_long)
    return Conversations(splits, settings, seed)


TASK_DATA = {
    "text": _texts,
    "classification": Classes.of,
    "token-classification": Tags.of,
    "seq2seq": Completions.of,
    **dict.fromkeys(("dpo", "kto", "orpo", "grpo"), Preferred.of),
}
"""What is made of rows for each task; a new task is a file with a `TaskData` and a line here."""


def read(settings: DataSettings, task: str = "auto", seed: int = 0) -> Data:
    """The rows of a task, which is found by looking at them unless it is given; raises DataError, ConfigError."""
    if settings.streaming:
        return Streamed.of(settings, task, seed)
    splits = read_splits(settings, task, seed)
    return TASK_DATA[splits.task](splits, settings, seed)
