"""The data of a comparison, written down once: every run learns from the same rows and is asked the same questions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.errors import ConfigError, DataError
from slimtune.storage.atomic import staged

if TYPE_CHECKING:
    from slimtune.data.reading import SourceRows, Splits
    from slimtune.data.settings import DataSettings

TRAIN, QUESTIONS = "train.jsonl", "questions.jsonl"
ANSWERED = ("text", "classification")
"""Tasks whose rows end in an answer that can be judged."""


def write_dataset(settings: DataSettings, task: str, seed: int, limit: int | None, folder: Path) -> str:
    """Write both files into `folder`; what they are called together.

    Raises:
        ConfigError: nothing is held out, or the data can't be the same for all runs.
        DataError: rows that can't be read, or that have no answer.
    """
    from slimtune.data.reading import read_splits

    _refuse_what_differs(settings)
    splits = read_splits(settings, task, seed)
    questions = _asked(splits)[:limit]
    with staged(folder, overwrite=True) as scratch:
        _write(scratch / TRAIN, (row for source in splits.train for row in source.rows))
        _write(scratch / QUESTIONS, questions)
    return _names(splits.train)


def _refuse_what_differs(settings: DataSettings) -> None:
    if settings.streaming:
        raise ConfigError("compare writes its data down once, so that all runs see the same; set data.streaming: false")
    if any(source.weight is not None for source in settings.train):
        raise ConfigError(
            "compare takes every row of each source, and some of these have a weight; mix them first, or leave the "
            "weights out"
        )
    if not settings.held_out:
        raise ConfigError(
            "compare asks questions that nothing was trained on, and nothing is held out; set data.held_out to a share "
            "such as 0.1, or to a file"
        )


def _asked(splits: Splits) -> Sequence[Any]:
    if splits.task not in ANSWERED:
        raise ConfigError(f"compare judges answers and labels, and this is data for task {splits.task}")
    rows = [row for source in splits.held_out for row in source.rows]
    if splits.task == "text" and not all(_is_answered(row) for row in rows):
        raise DataError(
            f"some held-out rows of {_names(splits.held_out)} end in no answer; compare has nothing to judge"
        )
    if len(rows) < 2:
        raise DataError(f"compare needs at least 2 held-out questions, found {len(rows)}; hold out more")
    return rows


def _is_answered(row: Any) -> bool:
    turns = row.turns() if hasattr(row, "turns") else []
    return bool(turns) and turns[-1]["role"] == "assistant"


def _names(sources: Sequence[SourceRows]) -> str:
    # With its folder, for half of all data is called train.jsonl; not with the whole path, which is this machine's.
    return ", ".join("/".join(Path(source.name).parts[-2:]) for source in sources)


def _write(path: Path, rows: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(_line_of(row), ensure_ascii=False) + "\n")


def _line_of(row: Any) -> dict[str, Any]:
    """The row as a line of JSON from which the same row is read."""
    line = row.model_dump(exclude_none=True)
    if "messages" in line:
        # A weight is no part of the message that templates see.
        line["messages"] = [
            message | ({} if turn.weight else {"weight": 0})
            for message, turn in zip(line["messages"], row.messages, strict=True)
        ]
    return line
