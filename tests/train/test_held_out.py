"""`eval_loss` is the mean over all that is learned of the held-out examples, whatever batches they come in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

from slimtune import LoraConfig, get_peft_model
from slimtune.data.batches import Objective, PadRight
from slimtune.data.settings import DataSettings
from slimtune.data.tasks.base import EncodedDataset
from slimtune.data.tasks.registry import read
from slimtune.models.load import LoadOptions, load_model
from slimtune.recipe.training import TrainSettings
from slimtune.train.checks import LastGood
from slimtune.train.loop import fine_tune
from slimtune.train.trainer import supervised
from small_encoder import reviews, save_encoder
from small_seq2seq import save_seq2seq, translations
from small_text_model import save_base, write_lines


def answers(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Answers of between 1 and 60 words."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (count,), generator=draw).tolist()
    return [{"prompt": f"count to {n}", "completion": " ".join(map(str, range(n)))} for n in lengths]


def tagged(count: int) -> list[dict[str, Any]]:
    words, tags = ["the", "film", "was", "bad", "and", "so", "was", "the", "cast", "of", "it"], ["O", "A", "B"] * 4
    return [{"tokens": words[: 2 + i % 9], "tags": tags[: 2 + i % 9]} for i in range(count)]


@dataclass(frozen=True)
class Case:
    """Rows, the task that they are for, and what its data section says besides."""

    rows: list[dict[str, Any]]
    base: Any
    task: str = "auto"
    shifts: int = 0
    settings: tuple[str, ...] = ()


CASES = {
    "text": Case(answers(19), save_base, shifts=1),
    "packing": Case(answers(19), save_base, shifts=1, settings=("packing",)),
    "streaming": Case(answers(19), save_base, shifts=1, settings=("streaming",)),
    "seq2seq": Case(translations()[:7], lambda folder: save_seq2seq(folder, "t5"), "seq2seq"),
    "tagging": Case(tagged(13), save_encoder),
    "classification": Case(reviews(13), save_encoder),
}


def lesson_of(case: Case, folder: Path) -> tuple[EncodedDataset, Any, Any]:
    """What is learned and held out, by a model with dropout."""
    path = write_lines(folder / "rows.jsonl", *case.rows)
    settings = DataSettings(path, held_out=[path], **dict.fromkeys(case.settings, True))
    data = read(settings, case.task)
    base, options = str(case.base(folder / "base")), LoadOptions("float32", "cpu", False)
    model, tokenizer = load_model(base, data.model_task, options, data.names)
    config = LoraConfig(r=4, task_type=data.task_type, lora_dropout=0.1)
    return data.encode(model, tokenizer), get_peft_model(model, config), tokenizer


@torch.no_grad()
def mean_by_hand(model: Any, lesson: EncodedDataset, collate: Any, shifts: int) -> float:
    """Each example alone, all their losses added up, divided by how many there were."""
    model.eval()
    found = []
    for example in lesson.held_out:
        batch = dict(collate([example]))
        labels = batch["labels"]
        logits = model(**batch).logits.double()
        logits = logits[:, : logits.shape[1] - shifts] if labels.ndim > 1 else logits
        target = labels[:, shifts:] if labels.ndim > 1 else labels
        each = cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none")
        found.append(each[target.flatten() != -100])
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("name", CASES)
def test_batches_of_any_size_give_the_same_loss(name: str, tmp_path: Path) -> None:
    lesson, model, tokenizer = lesson_of(CASES[name], tmp_path)
    objective = lesson.objective or Objective(PadRight(tokenizer.pad_token_id))
    found, last_good = {}, LastGood(model, has_copy=False)
    for size in (1, 3, 8):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_eval_batch_size=size, use_cpu=True, report_to="none",
            prediction_loss_only=True, label_names=["labels"], remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = supervised(objective).trainer(
            model=model, args=arguments, eval_dataset=cast(Any, lesson.held_out), last_good=last_good,
            checkpointer=cast(Any, None),
        )  # fmt: skip
        found[size] = trainer.evaluate()["eval_loss"]
    expected = mean_by_hand(model, lesson, objective.collate, CASES[name].shifts)
    assert found == pytest.approx(dict.fromkeys(found, expected), rel=1e-5)


def test_a_run_goes_by_it(tmp_path: Path) -> None:
    """What is written, what the best checkpoint goes by, and what comes out; the batches are uneven."""
    lesson, model, tokenizer = lesson_of(CASES["text"], tmp_path)
    settings = TrainSettings(
        max_steps=6, batch_size=8, eval_steps=2, learning_rate=0.1, keep_best="loss", scheduler="constant"
    )
    screen = Console(quiet=True)
    outcome = fine_tune(model, tokenizer, lesson.examples, settings, tmp_path, screen, lesson.held_out)
    written = [json.loads(line) for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line["eval_loss"] for line in written if "eval_loss" in line}
    assert set(by_step) == {2, 4, 6}
    assert outcome.eval_loss == min(by_step.values()) == by_step[outcome.best_step or 0]
    expected = mean_by_hand(model, lesson, PadRight(tokenizer.pad_token_id), shifts=1)
    assert outcome.eval_loss == pytest.approx(expected, rel=1e-5)
