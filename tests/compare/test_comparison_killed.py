"""A comparison that is killed in the middle of a training goes on with that training, to the same bits."""

from __future__ import annotations

import fcntl
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from killed import lines, start
from slimtune.cli import app
from small_text_model import orders, save_base, write_lines


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows = write_lines(tmp_path / "rows.jsonl", *({"messages": example.messages()} for example in orders(24)))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{name: {save_base(tmp_path / 'base')}, dtype: float32, device: cpu}}\n"
        f"data: {{train: {rows}, held_out: 0.25, max_length: 256}}\n"
        "method: {name: lora, r: 4, lora_dropout: 0.2}\n"
        "training: {max_steps: 80, batch_size: 2, save_steps: 10, learning_rate: 0.01}\n"
        "compare: {methods: [lora], shots: [], seeds: 1, max_new_tokens: 2, texts: 0, spectra: none}\n"
    )
    return path


def kill(process: Any, moment: Callable[[], bool]) -> None:
    """Kill it with what it has started, as soon as the moment has come."""
    wait_until(lambda: moment() or not process.is_alive())
    for each in [process, *psutil.Process(process.pid).children(recursive=True)]:
        each.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def is_free(lock: Path) -> bool:
    """Whether no process trains there any more."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def wait_until(moment: Callable[[], bool]) -> None:
    end = time.monotonic() + 200
    while not moment():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_a_comparison_goes_on_in_the_middle_of_a_training(recipe: Path, tmp_path: Path) -> None:
    """Killed at some step with the training below it; afterwards the adapter is that of the run's own recipe."""
    output, screen = tmp_path / "out", tmp_path / "screen.txt"
    place = output / "runs" / "lora-seed-0"
    begun = place / "tuned.run"
    compare = ("compare", recipe, "-o", output)
    kill(start(*compare, screen=screen), lambda: lines(begun / "loss.jsonl") >= 25)
    wait_until(lambda: is_free(begun / "lock"))
    assert not (place / "tuned").exists()
    kept = max(int(path.name.rpartition("-")[2]) for path in begun.glob("checkpoint-*[0-9]"))
    assert 20 <= kept < 80
    kill(start(*compare, screen=screen), (place / "tuned" / "results.json").is_file)
    assert f"going on after step {kept}" in (place / "log.txt").read_text()
    alone = CliRunner().invoke(app, ["train", str(place / "recipe.yaml"), "--output", str(tmp_path / "alone")])
    assert alone.exit_code == 0, alone.output
    for name in ("adapter_model.safetensors", "loss.jsonl"):
        assert (place / "tuned" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
