"""Rows that are wrong in ways that were met: each is told in a sentence with its place."""

from __future__ import annotations

import json
import logging.handlers
from pathlib import Path
from typing import Any

import pytest

from slimtune.data.reading import read_rows
from slimtune.errors import ConfigError, DataError
from slimtune.recipe.training import TrainSettings

ANSWER = {"role": "assistant", "content": "yes"}


def refused(path: Path, task: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path, task)
    said = str(caught.value)
    assert str(path) in said
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user"}, ANSWER]}, "messages.0: a turn needs content, or calls of tools"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "messages.0: a turn needs content"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": []}]}, "messages.1"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]}, "messages.0.content"),
        ({"prompt": 3, "completion": "b"}, "prompt: input should be a valid string"),
        ({"prompt": None, "completion": "b"}, "prompt: input should be a valid string"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "prompt: input should be a valid string"),
        ({"prompt": "a", "completion": [ANSWER]}, "completion: input should be a valid string"),
    ],
    ids=str,
)
def test_rows_of_text(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    assert f"line 1: {said}" in refused(path)


def test_a_turn_may_call_and_say_nothing(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}))
    assert read_rows(tmp_path / "rows.jsonl")[0].messages[1].content == ""


def test_a_pair_of_which_neither_is_better(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}))
    assert "line 1: chosen and rejected are the same" in refused(path, "dpo")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1 is not JSON (it is nested too deeply"),
        ("a.json", "[" * 100_000 + "]" * 100_000, "is not JSON (it is nested too deeply"),
        ("a.csv", "text,text\na,b\n", "has more than one column text"),
    ],
)
def test_files(name: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert said in refused(tmp_path / name)


def test_an_empty_table_is_told_once(tmp_path: Path) -> None:
    logged, library = logging.handlers.BufferingHandler(100), logging.getLogger("datasets")
    (tmp_path / "a.parquet").write_bytes(b"")
    library.addHandler(logged)
    try:
        assert "can't be read: Parquet file size is 0 bytes" in refused(tmp_path / "a.parquet")
    finally:
        library.removeHandler(logged)
    assert not logged.buffer


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", float("inf")), ("warmup", float("inf")), ("learning_rate", float("inf"))]
)
def test_numbers_without_an_end(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a finite number"):
        TrainSettings(**{name: value})


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5])
def test_seeds_that_no_generator_takes(seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed must be a whole number from 0"):
        TrainSettings(seed=seed)
