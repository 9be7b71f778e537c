"""EVA's start is made of the very examples that are learned, and a stream that gives it too little is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from slimtune import LoraConfig, get_peft_model, initialize_lora_eva_weights
from slimtune.adapters.adapter import attached
from slimtune.data.batches import Encoded, PadRight
from slimtune.data.settings import DataSettings
from slimtune.data.tasks.base import EncodedDataset
from slimtune.data.tasks.registry import read
from slimtune.errors import ConfigError
from slimtune.recipe.training import TrainSettings
from slimtune.train.eva_start import start_by_eva
from small_text_model import orders, tiny_model, tiny_tokenizer, write_lines

TOKENIZER = tiny_tokenizer()
SETTINGS = TrainSettings(batch_size=8)


def waiting() -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny_model(), LoraConfig(r=4, init_lora_weights="eva", target_modules=["q_proj", "v_proj"]))


def directions(model: Any) -> dict[str, torch.Tensor]:
    return {site.name: delta.trained[0].detach().clone() for site, delta in attached(model, "default")}  # type: ignore[attr-defined]


def test_the_examples_themselves_are_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *({"messages": e.messages()} for e in orders(8)))
    lesson = read(DataSettings(path)).encode(tiny_model(), TOKENIZER)
    model, expected, said = waiting(), waiting(), []
    before = directions(model)
    start_by_eva(model, TOKENIZER, lesson, SETTINGS, tmp_path, said.append)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    initialize_lora_eva_weights(expected, [PadRight(TOKENIZER.pad_token_id)([lesson.examples[i] for i in order])])
    found = directions(model)
    assert any(before[name].shape != rows.shape or not before[name].equal(rows) for name, rows in found.items())
    for name, rows in directions(expected).items():
        # All are in one batch, in whatever order: what is spanned is the same.
        torch.testing.assert_close(found[name].T @ found[name], rows.T @ rows, rtol=1e-3, atol=1e-4)
    assert "started by EVA from the data: ranks from" in said[0]


def test_another_start_reads_nothing(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"]))
    start_by_eva(model, TOKENIZER, EncodedDataset([], [], {}, []), SETTINGS, tmp_path, lambda what: pytest.fail(what))


def test_a_stream_of_too_little_comes_to_an_end(tmp_path: Path) -> None:
    class Endless(IterableDataset[Encoded]):
        def __iter__(self) -> Iterator[Encoded]:
            while True:
                yield Encoded([5, 6], [-100, 6])

    settings = TrainSettings(batch_size=1)
    with pytest.raises(ConfigError, match="EVA found no batch"):
        start_by_eva(waiting(), TOKENIZER, EncodedDataset(Endless(), [], {}, []), settings, tmp_path, print)
