"""A run shares what rows begin with where it pays, says so, and learns what it learns without."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import DataCollatorForSeq2Seq

from slimtune import LoraConfig, get_peft_model
from slimtune.data.batches import Encoded, Objective, PackRows, token_loss
from slimtune.data.prefixes import PrefixGroups
from slimtune.errors import ConfigError
from slimtune.recipe.training import TrainSettings
from slimtune.train import sharing
from slimtune.train.loop import fine_tune
from small_seq2seq import seq2seq_tokenizer, t5
from small_text_model import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SAID = "times fewer tokens"


def examples(shared: int) -> list[Encoded]:
    drawn = torch.Generator().manual_seed(0)
    system = torch.randint(4, 60, (shared,), generator=drawn).tolist()
    rows = [torch.randint(4, 60, (12,), generator=drawn).tolist() for _ in range(16)]
    return [Encoded(system + row, [-100] * (shared + 4) + row[4:]) for row in rows]


def train(folder: Path, data: list[Encoded], **settings: Any) -> tuple[list[float], str, int]:
    """The losses, what was shown, and the most tokens that were trained at once."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear"))
    tokens = [0]
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: tokens.append(args[0].numel()) if module.training else None
    )
    screen = Console(file=io.StringIO(), width=200)
    chosen = TrainSettings(learning_rate=0.01, max_steps=6, batch_size=4, **settings)
    objective = Objective(PackRows.of(model, 0), token_loss) if isinstance(data[0], list) else None
    fine_tune(model, TOKENIZER, data, chosen, folder, screen, data[:4], objective=objective)
    lines = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], screen.file.getvalue(), max(tokens)  # type: ignore[attr-defined]


def test_it_is_done_where_it_pays_and_learns_the_same(tmp_path: Path) -> None:
    data = examples(30)
    losses, shown, most = train(tmp_path / "shared", data)
    expected, silent, all_tokens = train(tmp_path / "padded", data, share_prefixes=False)
    assert "2.15 times fewer tokens" in shown
    assert SAID not in silent
    assert (most, all_tokens) == (30 + 4 * 12, 4 * 42)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_examples_of_packed_rows_attend_to_themselves_alone(tmp_path: Path) -> None:
    data: Any = [examples(0)[at : at + 4] for at in range(0, 16, 4)]
    losses, shown, _ = train(tmp_path / "apart", data)
    expected, silent, _ = train(tmp_path / "masked", data, share_prefixes=False)
    assert "examples in a packed row attend to themselves alone: 4.0 times fewer pairs of tokens" in shown
    assert "attend" not in silent
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_a_prompt_with_several_targets_is_encoded_once(tmp_path: Path) -> None:
    drawn = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 15, (10,), generator=drawn).tolist() for _ in range(4)]
    # Each prompt with its four targets, apart from each other.
    rows = [
        {"input_ids": prompt, "labels": torch.randint(4, 15, (5,), generator=drawn).tolist()} for prompt in prompts * 4
    ]
    losses, shown = {}, {}
    for name, settings in {"apart": {"share_prefixes": False}, "at random": {}, "grouped": {}}.items():
        model = get_peft_model(t5(), LoraConfig(r=4, target_modules=["q", "v"]))
        screen = Console(file=io.StringIO(), width=200)
        chosen = TrainSettings(
            learning_rate=0.01, max_steps=3, batch_size=4, group_prefixes=name == "grouped", **settings
        )
        objective = Objective(DataCollatorForSeq2Seq(seq2seq_tokenizer(False), model=model), token_loss)
        fine_tune(model, seq2seq_tokenizer(False), rows, chosen, tmp_path / name, screen, objective=objective)
        lines = [json.loads(line) for line in (tmp_path / name / "loss.jsonl").read_text().splitlines()]
        losses[name] = torch.tensor([line["loss"] for line in lines if "loss" in line])
        shown[name] = screen.file.getvalue()  # type: ignore[attr-defined]
    assert SAID not in shown["apart"]
    assert "a prompt that stands in a batch several times is encoded once: 1." in shown["at random"]
    torch.testing.assert_close(losses["at random"], losses["apart"], rtol=1e-4, atol=1e-5)
    assert "encoded once: 4.00 times fewer tokens" in shown["grouped"]


def questions(document: int = 30, count: int = 4) -> list[Encoded]:
    """Four questions on each of some documents."""
    drawn = torch.Generator().manual_seed(0)
    texts = [torch.randint(4, 60, (document,), generator=drawn).tolist() for _ in range(count)]
    rows = [(text, torch.randint(4, 60, (12,), generator=drawn).tolist()) for text in texts * 4]
    return [Encoded(text + row, [-100] * document + row) for text, row in rows]


def test_grouped_on_demand_batches_share_more_and_what_that_would_save_is_told(tmp_path: Path) -> None:
    data = questions()
    _, shown, _ = train(tmp_path / "random", data)
    assert "with training.group_prefixes=true, which puts examples that begin alike into one batch, 2.15" in shown
    _, shown, most = train(tmp_path / "grouped", data, group_prefixes=True)
    assert "2.15 times fewer tokens" in shown
    assert "group_prefixes" not in shown
    # Each batch is of one document: its 30 tokens once, and four questions.
    assert most == 30 + 4 * 12


def test_of_a_large_data_set_a_part_is_sorted_to_say_what_grouping_would_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sorted_at_once: list[int] = []

    class Counted(PrefixGroups):
        def __init__(self, rows: Any) -> None:
            sorted_at_once.append(len(rows))
            super().__init__(rows)

    monkeypatch.setattr(sharing, "PrefixGroups", Counted)
    monkeypatch.setattr(sharing, "MOST_GROUPED", 12)
    _, shown, _ = train(tmp_path / "random", questions())
    assert sorted_at_once == [12]
    assert "with training.group_prefixes=true, which puts examples that begin alike into one batch" in shown


def test_grouping_without_sharing_and_what_can_t_be_grouped_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing but the order with training\.share_prefixes=false"):
        TrainSettings(share_prefixes=False, group_prefixes=True)
    packed: Any = [[example] for example in examples(30)]
    with pytest.raises(ConfigError, match="these are a stream, packed rows or prompts"):
        train(tmp_path, packed, group_prefixes=True)


def test_it_is_left_out_where_nothing_is_shared(tmp_path: Path) -> None:
    _, shown, most = train(tmp_path, examples(0))
    assert SAID not in shown
    assert most == 4 * 12


def test_asked_for_on_a_model_that_can_t_it_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimtune.models.prefix_trial.ROUNDING", {torch.float32: 0.0})
    with pytest.raises(ConfigError, match=r"leave training\.share_prefixes out"):
        train(tmp_path / "asked", examples(30), share_prefixes=True)
    # Left open, it is trained as ever.
    _, shown, most = train(tmp_path / "open", examples(30))
    assert SAID not in shown
    assert "is computed for each of them: " in shown
    assert "its hidden states differ by" in shown
    assert most == 4 * 42
