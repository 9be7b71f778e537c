"""What is too long is dropped or cut with a word, of the rows that are learned and of those that are held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slimtune.data.settings import DataSettings
from slimtune.data.tasks.base import Remark
from slimtune.data.tasks.registry import read
from small_seq2seq import seq2seq_tokenizer, t5
from small_text_model import tiny_model, tiny_tokenizer, write_lines

LONG = "two large lattes and one tea, please " * 20
ROWS: dict[str, tuple[Any, Any]] = {
    "text": ({"text": "one tea"}, {"text": LONG}),
    "classification": ({"text": "one tea", "label": "a"}, {"text": LONG, "label": "b"}),
    "token-classification": (
        {"tokens": ["one", "tea"], "tags": ["O", "B"]},
        {"tokens": LONG.split(), "tags": ["O", "B"] * (len(LONG.split()) // 2)},
    ),
    "seq2seq": ({"prompt": "one tea", "completion": "no"}, {"prompt": LONG, "completion": "no"}),
    "dpo": (
        {"prompt": "one tea", "chosen": "a latte", "rejected": "no"},
        {"prompt": "one tea", "chosen": LONG, "rejected": "no"},
    ),
}
"""A short row and a long one of each task."""


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
@pytest.mark.parametrize("where", ["train", "held_out", "nowhere"])
@pytest.mark.parametrize("task", ROWS)
def test_what_becomes_of_long_rows_is_told(task: str, where: str, too_long: str, tmp_path: Path) -> None:
    short, long = ROWS[task]
    other = {**short, "label": "b"} if "label" in short else short
    few, more = [short, other], [short, other, long, long]
    train = write_lines(tmp_path / "train.jsonl", *(more if where == "train" else few))
    held_out = write_lines(tmp_path / "held_out.jsonl", *(more if where == "held_out" else few))
    there = 0.0 if where == "nowhere" else [str(held_out)]
    settings = DataSettings(str(train), held_out=there, max_length=40, too_long=too_long)
    is_encoder_decoder = task == "seq2seq"
    model = t5() if is_encoder_decoder else tiny_model()
    tokenizer = seq2seq_tokenizer(starts=False) if is_encoder_decoder else tiny_tokenizer()
    told = [part for part in read(settings, task).encode(model, tokenizer).report if isinstance(part, Remark)]
    lost = [remark.warning for remark in told if remark.warning.endswith((" dropped", " cut"))]
    unit = {"text": "example", "seq2seq": "pair", "dpo": "row"}.get(task, "text")
    verb = "cut" if too_long == "truncate" else "dropped"
    expected = {"train": [f"2 {unit}s {verb}"], "held_out": [f"2 held-out {unit}s {verb}"], "nowhere": []}
    assert lost == expected[where]
