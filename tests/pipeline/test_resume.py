"""A run that is killed at any moment and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import functools
import hashlib
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from killed import finish, kill_process, kill_when, lines, start
from slimtune.cli import app
from small_encoder import reviews, save_encoder
from small_text_model import orders, save_base, write_lines

STEPS = 14
CASES: dict[str, list[Any]] = {
    "lora": ["--rank", 4, "method.lora_dropout=0.2", "training.gradient_accumulation=2", "--batch-size", 2],
    "adalora": ["--method", "adalora", "method.init_r=6", "method.target_r=2", "method.deltaT=2"],
    "pissa": ["--rank", 4, "method.init_lora_weights=pissa"],
    "full": ["--method", "full", "model.dtype=float32", "data.held_out=0.2"],
    "head": ["--rank", 4, "method.lora_dropout=0.1", "data.held_out=0.2"],
    "eva": ["--rank", 4, "method.init_lora_weights=eva", "method.lora_dropout=0.1"],
    "nf4": ["--rank", 4, "--quantize", "nf4", "method.lora_dropout=0.1"],
    "int8": ["--rank", 4, "--quantize", "int8"],
    "torchao": ["--rank", 4, "--quantize", "int8-torchao", "method.target_modules=[q_proj,v_proj]"],
    "embeddings": ["--rank", 4, "method.modules_to_save=[embed_tokens]", "training.lora_plus_ratio=4"],
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


def train(case: str, files: list[Path], output: Path, save_steps: int = 3) -> list[Any]:
    every = ["--max-steps", STEPS, "--learning-rate", 0.01, "--no-plan", "model.device=cpu"]
    every += [f"training.save_steps={save_steps}", "--batch-size", 4]
    return ["train", *files, "--output", output, *every, *CASES[case]]


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, list[Path]], dict[str, str]]:
    """What a case comes to that is left alone, trained once."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @functools.cache
    def of(case: str, *files: Path) -> dict[str, str]:
        finish(*train(case, [*files], folder / case), screen=folder / "screen.txt")
        return sums(folder / case)

    return lambda case, files: of(case, *files)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_as_one_that_was_not(
    case: str, tmp_path: Path, request: pytest.FixtureRequest, undisturbed: Any
) -> None:
    """Killed twice, at moments drawn by seed, and resumed twice."""
    files = request.getfixturevalue("texts_with_labels" if case == "head" else "text")
    screen, output = tmp_path / "screen.txt", tmp_path / "tuned"
    draw, log = random.Random(case), tmp_path / "tuned.run" / "loss.jsonl"
    for first, last, resume in ((1, 7, []), (7, STEPS - 1, ["--resume"])):
        step, delay = draw.randint(first, last), draw.uniform(0, 0.02)
        process = start(*train(case, files, output), *resume, screen=screen)
        assert kill_when(process, lambda step=step: lines(log) >= step, delay) == -9, screen.read_text()
        assert not output.exists()
    finish(*train(case, files, output), "--resume", screen=screen)
    assert sums(output) == undisturbed(case, files)
    assert len(sums(output)) == 2
    assert not (tmp_path / "tuned.run").exists()


def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before(
    text: list[Path], tmp_path: Path, undisturbed: Any
) -> None:
    """Killed when the third checkpoint was begun and not yet renamed, again and again."""
    screen, output = tmp_path / "screen.txt", tmp_path / "tuned"
    draw, run, torn = random.Random(3), tmp_path / "tuned.run", 0
    for step in (3, 6, 9):
        process = start(*train("lora", text, output), *(["--resume"] if step > 3 else []), screen=screen)
        partial = run / f"checkpoint-{step}.partial"
        assert kill_when(process, partial.exists, draw.uniform(0, 0.004)) == -9
        torn += partial.exists()
    assert torn, "no kill came in the middle of a save"
    finish(*train("lora", text, output), "--resume", screen=screen)
    assert sums(output) == undisturbed("lora", text)


@pytest.mark.slow
def test_the_command_itself_is_killed_by_ctrl_c_and_goes_on(text: list[Path], tmp_path: Path, undisturbed: Any) -> None:
    """In a process as a shell starts it: 130, one sentence that says how to go on, and the same end."""
    output, log = tmp_path / "tuned", tmp_path / "tuned.run" / "loss.jsonl"
    arguments = [str(argument) for argument in train("pissa", text, output)]
    screen = (tmp_path / "screen.txt").open("w+")
    process = subprocess.Popen([sys.executable, "-m", "slimtune", *arguments], stdout=screen, stderr=screen)
    assert kill_process(process, lambda: lines(log) >= 4, signal.SIGINT) == 130
    said = Path(screen.name).read_text()
    assert re.search(r"stopped by SIGINT after step \d+ of 14.*same command and --resume", " ".join(said.split()))
    assert "Traceback" not in said
    finish(*arguments, "--resume", screen=Path(screen.name))
    assert sums(output) == undisturbed("pissa", text)


def test_what_can_not_be_resumed_says_why(text: list[Path], tmp_path: Path) -> None:
    screen, output = tmp_path / "screen.txt", tmp_path / "tuned"
    process = start(*train("lora", text, output), screen=screen)
    log = tmp_path / "tuned.run" / "loss.jsonl"
    assert kill_when(process, lambda: lines(log) >= 8, number=signal.SIGTERM) == 143
    anew = invoke(*train("lora", text, output))
    assert anew.exit_code == 2
    assert "was broken off after step" in anew.stderr
    assert "--resume" in anew.stderr
    assert "--overwrite" in anew.stderr
    other = [*train("lora", text, output), "--resume", "--rank", 8, "training.weight_decay=0.1"]
    refused = invoke(*other)
    assert refused.exit_code == 2
    assert "method.r was 4 and is 8" in refused.stderr
    assert "training.weight_decay was 0.0 and is 0.1" in refused.stderr
    # Neither how often it is saved nor where it is reported to changes a number.
    assert invoke(*train("lora", text, output, save_steps=5), "--resume").exit_code == 0
    again = invoke(*train("lora", text, output), "--resume")
    assert again.exit_code == 2
    assert "has finished: there is nothing to resume" in again.stderr
    assert "there is no run to resume" in invoke(*train("lora", text, tmp_path / "never"), "--resume").stderr


def test_other_examples_are_not_trained_on_silently(text: list[Path], tmp_path: Path) -> None:
    base, data = text[0], tmp_path / "train.jsonl"
    data.write_bytes(text[1].read_bytes())
    screen, output = tmp_path / "screen.txt", tmp_path / "tuned"
    process = start(*train("lora", [base, data], output), screen=screen)
    kill_when(process, lambda: lines(tmp_path / "tuned.run" / "loss.jsonl") >= 8)
    data.write_text(data.read_text().replace("please", "pleese", 1))
    refused = invoke(*train("lora", [base, data], output), "--resume")
    assert refused.exit_code == 2
    assert "the examples" in refused.stderr
