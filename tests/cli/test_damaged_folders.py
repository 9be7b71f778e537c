"""Folders that are damaged in any way: one sentence and its exit code, never a traceback."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from damages import changed_fields, damaged, put
from killed import kill_when, start
from small_encoder import reviews, save_encoder
from small_text_model import write_lines


def answers_in_a_sentence(run: Any, *command: Any) -> None:
    """Whatever the folder holds, the command ends as a command does."""
    result = run(*command)
    assert result.exit_code in (0, 1, 2), (command, result.output[-2000:])
    assert result.exception is None or isinstance(result.exception, SystemExit), (command, repr(result.exception))
    if result.exit_code:
        assert result.stderr.splitlines()[-1].startswith("slimtune: "), result.stderr[-500:]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A classifier on features, and texts for it."""
    from cli.conftest import invoke

    folder = tmp_path_factory.mktemp("judge")
    rows = write_lines(folder / "rows.jsonl", *reviews(12))
    made = invoke(
        "train",
        save_encoder(folder / "base"),
        rows,
        "-o",
        folder / "judge",
        "--method",
        "features",
        "method.solver=torch",
    )
    assert made.exit_code == 0, made.output
    return folder / "judge", rows


@pytest.mark.parametrize("name", ["features.json", "classifier.safetensors"])
def test_classifiers_on_features(run: Any, judge: tuple[Path, Path], name: str) -> None:
    folder, rows = judge
    whole = (folder / name).read_bytes()
    for data in damaged(whole).values():
        put(folder / name, data)
        answers_in_a_sentence(run, "predict", folder, rows)
        answers_in_a_sentence(run, "info", folder)
    put(folder / name, whole)


def test_fields_of_a_classifier_on_features(run: Any, judge: tuple[Path, Path]) -> None:
    folder, rows = judge
    for _ in changed_fields(folder / "features.json"):
        answers_in_a_sentence(run, "predict", folder, rows)


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (torch.zeros(1, 32), torch.zeros(2)),
        (torch.zeros(32), torch.zeros(1)),
        (torch.zeros(1, 31), torch.zeros(1)),
        (torch.zeros(0, 32), torch.zeros(0)),
        (torch.zeros(()), torch.zeros(())),
        (torch.zeros(1, 32, dtype=torch.int64), torch.zeros(1)),
        (torch.full((1, 32), float("nan")), torch.zeros(1)),
        (torch.zeros(1, 32, dtype=torch.complex64), torch.zeros(1)),
    ],
)
def test_tensors_of_a_classifier_on_features(
    run: Any, judge: tuple[Path, Path], tmp_path: Path, weight: torch.Tensor, bias: torch.Tensor
) -> None:
    folder, rows = judge
    own = Path(shutil.copytree(folder, tmp_path / "judge"))
    save_file({"weight": weight, "bias": bias}, own / "classifier.safetensors")
    result = run("predict", own, rows)
    assert result.exit_code == 2, result.output
    assert "the classifier" in result.stderr


@pytest.mark.slow
def test_the_folder_of_a_run_that_was_broken_off(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    options = ["--max-steps", 200, "training.save_steps=2", "--rank", 2, "--batch-size", 2, "--no-plan"]
    train = ["train", base, data, "-o", tmp_path / "tuned", *options]
    kill_when(start(*train, screen=tmp_path / "screen.txt"), (tmp_path / "tuned.run/checkpoint-4").is_dir)
    broken_off = tmp_path / "tuned.run"
    whole = Path(shutil.copytree(broken_off, tmp_path / "whole"))
    for number, file in enumerate(sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())):
        forms = list(damaged((whole / file).read_bytes(), seed=number).values())
        for data in random.Random(number).sample(forms, 2):
            shutil.rmtree(broken_off)
            shutil.copytree(whole, broken_off)
            put(broken_off / file, data)
            answers_in_a_sentence(run, "info", broken_off)
            answers_in_a_sentence(run, *train, "training.max_steps=4", "--resume")
            shutil.rmtree(tmp_path / "tuned", ignore_errors=True)
            broken_off.mkdir(exist_ok=True)
