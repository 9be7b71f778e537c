"""A run that is killed at any moment and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest

from killed import finish, kill_when, lines, start
from small_encoder import reviews, save_encoder
from small_text_model import orders, save_base, write_lines

STEPS = 14
CASES: dict[str, list[Any]] = {
    "lora": ["--rank", 4, "--dropout", 0.2, "--gradient-accumulation", 2, "--batch-size", 2],
    "adalora": ["--method", "adalora", "--set", "init_r=6", "--set", "target_r=2", "--set", "deltaT=2"],
    "pissa": ["--rank", 4, "--init", "pissa"],
    "full": ["--method", "full", "--dtype", "float32", "--eval-fraction", 0.2],
    "head": ["--rank", 4, "--dropout", 0.1, "--eval-fraction", 0.2],
    "embeddings": ["--rank", 4, "--modules-to-save", "embed_tokens", "--lora-plus-ratio", 4],
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("text")
    data = write_lines(folder / "train.jsonl", *({"messages": e.messages()} for e in orders(24)))
    return [save_base(folder / "base"), data]


@pytest.fixture(scope="module")
def texts_with_labels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("labels")
    return [save_encoder(folder / "base"), write_lines(folder / "train.jsonl", *reviews(24))]


def sums(folder: Path) -> dict[str, str]:
    """What of an output must be the same to the bit."""
    names = [path.name for path in folder.glob("*.safetensors")] + ["loss.jsonl"]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(names)}


def train(case: str, files: list[Path], output: Path) -> list[Any]:
    every = ["--max-steps", STEPS, "--learning-rate", 0.01, "--save-steps", 3, "--no-plan", "--device", "cpu"]
    return ["train", *files, "--output", output, "--batch-size", 4, *every, *CASES[case]]


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_as_one_that_was_not(case: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Killed twice, at moments drawn by seed, and resumed twice."""
    files = request.getfixturevalue("texts_with_labels" if case == "head" else "text")
    screen, output = tmp_path / "screen.txt", tmp_path / "tuned"
    finish(*train(case, files, tmp_path / "whole"), screen=screen)
    draw, log = random.Random(case), tmp_path / "tuned.run" / "loss.jsonl"
    for first, last, resume in ((1, 7, []), (7, STEPS - 1, ["--resume"])):
        step, delay = draw.randint(first, last), draw.uniform(0, 0.02)
        process = start(*train(case, files, output), *resume, screen=screen)
        assert kill_when(process, lambda step=step: lines(log) >= step, delay) == -9, screen.read_text()
        assert not output.exists()
    finish(*train(case, files, output), "--resume", screen=screen)
    assert sums(output) == sums(tmp_path / "whole")
    assert len(sums(output)) == 2
    assert not (tmp_path / "tuned.run").exists()
