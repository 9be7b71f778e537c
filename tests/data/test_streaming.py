"""Streams: the same examples as when all is read, in an order by seed, with mistakes where they are met."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from slimtune import LoraConfig, get_peft_model
from slimtune.data.batches import Encoded, PackRows, count_packed
from slimtune.data.encode import encode
from slimtune.data.reading import read_rows
from slimtune.data.settings import DataSettings
from slimtune.data.streaming import as_examples
from slimtune.data.tasks.base import EncodedDataset
from slimtune.data.tasks.registry import read
from slimtune.errors import ConfigError, DataError
from slimtune.recipe.recipe import Recipe
from slimtune.recipe.training import TrainSettings
from slimtune.train.loop import fine_tune
from small_text_model import orders, tiny_model, tiny_tokenizer, write_lines

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "orders.jsonl", *({"messages": e.messages()} for e in orders(40)))


def lesson(settings: DataSettings, seed: int = 0) -> EncodedDataset:
    return read(settings, seed=seed).encode(tiny_model(), TOKENIZER)


def streamed(train: Any, seed: int = 0, **settings: Any) -> list[Encoded]:
    found = [
        as_examples(item) for item in lesson(DataSettings(train, streaming=True, **settings), seed).examples.stream
    ]
    return [example for row in found for example in (row if isinstance(row, list) else [row])]


def key(example: Encoded) -> tuple[int, ...]:
    return (*example.input_ids, *example.labels)


def test_a_stream_holds_what_is_read_otherwise(path: Path) -> None:
    whole = encode(read_rows(path), TOKENIZER, 1024).examples
    found = streamed(path)
    assert sorted(map(key, found)) == sorted(map(key, whole))
    assert found != whole
    assert found == streamed(path)
    assert found != streamed(path, seed=1)
    assert sorted(map(key, streamed(path, packing=True))) == sorted(map(key, whole))


def test_a_stream_begins_anew_in_another_order(path: Path) -> None:
    endless = iter(lesson(DataSettings(path, streaming=True)).examples)
    first, second = ([Encoded(**item) for item in itertools.islice(endless, 40)] for _ in range(2))
    assert sorted(map(key, first)) == sorted(map(key, second))
    assert first != second
    with pytest.raises(DataError, match="no example of the stream is left"):
        lesson(DataSettings(path, streaming=True, max_length=8, too_long="drop"))


def test_packed_rows_are_full(path: Path) -> None:
    rows = [as_examples(item) for item in lesson(DataSettings(path, streaming=True, packing=True)).examples.stream]
    assert max(len(row) for row in rows if isinstance(row, list)) > 5
    batch = PackRows(0)(rows[:2])
    assert batch["input_ids"].shape[1] <= 1024
    assert count_packed(batch["position_ids"]) == sum(len(e.input_ids) for row in rows[:2] for e in row)


def test_several_sources_in_turn_or_by_weight(tmp_path: Path) -> None:
    def source(name: str, count: int) -> str:
        return str(write_lines(tmp_path / f"{name}.jsonl", *({"text": f"{name} {i}"} for i in range(count))))

    one, other = source("aaa", 30), source("bbb", 60)
    in_turn = Counter(TOKENIZER.decode(e.input_ids)[:3] for e in streamed([one, other]))
    assert in_turn == {"aaa": 30, "bbb": 60}
    weighted = streamed([{"path": one, "weight": 3}, {"path": other, "weight": 1}])
    names = Counter(TOKENIZER.decode(e.input_ids)[:3] for e in weighted)
    assert names["bbb"] >= 60
    assert names["aaa"] > 2 * names["bbb"]


def test_training_on_a_stream_counts_as_it_goes(path: Path, tmp_path: Path) -> None:
    longest = sorted(len(e.input_ids) for e in encode(read_rows(path), TOKENIZER, 1024).examples)
    found = lesson(DataSettings(path, streaming=True, max_length=longest[20], too_long="drop"))
    assert found.facts["examples"] == "streamed"
    trained = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear"))
    settings = TrainSettings(learning_rate=0.01, max_steps=12, batch_size=4)
    (tmp_path / "out").mkdir()
    outcome = fine_tune(
        trained, TOKENIZER, found.examples, settings, tmp_path / "out", Console(quiet=True), objective=found.objective
    )
    assert outcome.steps == 12
    told = found.after()
    assert told["examples read"] >= 48
    assert told["dropped"] >= 19


def test_mistakes_are_told_with_their_line(tmp_path: Path) -> None:
    rows = [{"text": "two teas"}] * 3
    path = write_lines(tmp_path / "rows.jsonl", *rows, {"txt": "x"})
    with pytest.raises(DataError, match=r"rows\.jsonl, line 4 has the fields txt"):
        streamed(path)
    long = write_lines(tmp_path / "long.jsonl", *rows, {"text": "tea " * 90})
    with pytest.raises(DataError, match=r"long\.jsonl, line 4"):
        streamed(long, max_length=30)
    pieces = streamed(long, max_length=30, too_long="split")
    assert max(len(e.input_ids) for e in pieces) == 30
    assert sum(e.learned for e in pieces) == sum(e.learned for e in streamed(long))


@pytest.mark.parametrize(
    ("row", "settings", "said"),
    [
        ({"text": "a"}, {"held_out": 0.1}, "can't be held out of a stream"),
        ({"text": "a", "label": "b"}, {}, "not for task classification"),
        ({"prompt": "a", "completion": "b"}, {"too_long": "split"}, "split is for texts"),
    ],
)
def test_what_needs_all_rows(tmp_path: Path, row: dict[str, str], settings: dict[str, Any], said: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", row)
    with pytest.raises(ConfigError, match=said):
        read(DataSettings(path, streaming=True, **settings))


def test_a_recipe_says_that_steps_are_needed(path: Path, tmp_path: Path) -> None:
    recipe = {"model": {"name": "x"}, "data": {"train": str(path), "streaming": True}, "output": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match=r"training\.max_steps"):
        Recipe.of(recipe)


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_that_was_broken_off_goes_on_where_it_was(path: Path, tmp_path: Path, packing: bool) -> None:
    """To the bit, through more than one time through the stream."""
    whole = trained_on(path, tmp_path / "whole", packing)
    with pytest.raises(RuntimeError, match="broken off"):
        trained_on(path, tmp_path / "parts", packing, stop_at=12)
    assert trained_on(path, tmp_path / "parts", packing, resume=True) == whole


def trained_on(
    path: Path, folder: Path, packing: bool, stop_at: int | None = None, resume: bool = False
) -> list[float]:
    """The trained numbers after 14 steps, or none: the run is broken off in a step."""
    found = lesson(DataSettings(path, streaming=True, packing=packing, max_length=200))
    torch.manual_seed(0)
    trained: Any = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1))
    calls = itertools.count(1)

    def break_off(*_: Any) -> None:
        if next(calls) == stop_at:
            raise RuntimeError("broken off")

    trained.model.register_forward_pre_hook(break_off)
    settings = TrainSettings(learning_rate=0.01, max_steps=14, batch_size=4, save_steps=3)
    folder.mkdir(exist_ok=True)
    fine_tune(
        trained, TOKENIZER, found.examples, settings, folder, Console(quiet=True), objective=found.objective,
        resume=resume,
    )  # fmt: skip
    return [value for p in trained.parameters() if p.requires_grad for value in p.detach().flatten().tolist()]
