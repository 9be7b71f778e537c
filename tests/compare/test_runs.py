"""A whole comparison on a tiny model: real processes, killed and gone on with, a method that fails, and its report."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.testing import CliRunner, Result

from damages import damaged, put
from slimtune.cli import app
from slimtune.compare.comparison import prepare
from slimtune.compare.results import read_result
from slimtune.compare.stages import ANSWERS, questions_of, result_of, stages_of
from slimtune.errors import SlimtuneError
from small_text_model import orders, save_base, write_lines

BROKEN = "lora:target_modules=no_such_module"


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    rows = write_lines(folder / "rows.jsonl", *({"messages": example.messages()} for example in orders(24)))
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {{name: {save_base(folder / 'base')}, dtype: float32}}\n"
        f"data: {{train: {rows}, held_out: 0.25, max_length: 256}}\n"
        "training: {max_steps: 2, batch_size: 2}\n"
        f"compare: {{methods: [lora, '{BROKEN}'], shots: [0], seeds: 1, max_new_tokens: 4, texts: 1, spectra: none}}\n"
    )
    return path


@pytest.fixture(scope="module")
def killed(recipe: Path) -> Path:
    """The folder of a comparison that was killed right after its first run."""
    output = recipe.parent / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "slimtune", "compare", str(recipe), "-o", str(output)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    first = output / "runs/base-seed-0/result.json"
    while not first.exists():
        assert process.poll() is None, "the comparison ended before its first run"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return output


@pytest.fixture(scope="module")
def done(recipe: Path, killed: Path) -> tuple[Path, Result]:
    """The same command again."""
    shutil.copy(killed / "runs/base-seed-0/result.json", killed.parent / "before.json")
    return killed, invoke(recipe, "-o", killed, "--json", "--price", "RTX 4090")


@pytest.mark.slow
def test_it_goes_on_where_it_was_killed(done: tuple[Path, Result]) -> None:
    folder, result = done
    assert "1 of 3 runs are there already" in result.stderr
    assert (folder / "runs/base-seed-0/result.json").read_text() == (folder.parent / "before.json").read_text()


def test_a_run_that_fails_is_told_and_stops_no_other(done: tuple[Path, Result]) -> None:
    folder, result = done
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert [row["runs"]["done"] for row in found["candidates"]] == [1, 1, 0]
    assert "no_such_module" in found["candidates"][2]["runs"]["failed"][0]
    assert any("no_such_module" in warning for warning in found["warnings"])
    assert "no_such_module" in (folder / "report.html").read_text()


def test_what_was_measured_is_real(done: tuple[Path, Result]) -> None:
    folder, result = done
    row = json.loads(result.stdout)["candidates"][1]
    assert row["peak_bytes"] > 100e6
    assert row["train_seconds"] > 0
    assert row["trainable_parameters"] > 1000
    adapter = folder / "runs/lora-seed-0/tuned/adapter_model.safetensors"
    assert row["size_bytes"] == adapter.stat().st_size
    assert len(row["domains"]) == 6
    assert all(domain["before"] > 0 for domain in row["domains"])
    assert row["score"]["questions"] == 6
    own = json.loads((folder / "runs/lora-seed-0/evaluate.json").read_text())
    assert row["score"]["mean"] == pytest.approx(own["scores"][own["metric"]])


def test_no_question_was_trained_on(done: tuple[Path, Result]) -> None:
    folder, _ = done
    train, asked = ((folder / f"data/{name}.jsonl").read_text().splitlines() for name in ("train", "questions"))
    assert (len(train), len(asked)) == (18, 6)
    assert not set(train) & set(asked)
    result = read_result(folder / "runs/base-seed-0/result.json")
    assert result.score
    assert len(result.score.answers) == 6
    text = (folder / "report.html").read_text()
    assert orders(24)[0].order.name in text or json.loads(asked[0])["messages"][1]["content"] in text


def test_seeds_and_methods_can_be_added_and_nothing_is_done_twice(done: tuple[Path, Result], recipe: Path) -> None:
    folder, _ = done
    times = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/result.json")}
    result = invoke(recipe, "-o", folder, "--methods", "lora", "--shots", "0,1", "--no-random-labels", "--json")
    assert result.exit_code == 0, result.output
    assert [row["candidate"] for row in json.loads(result.stdout)["candidates"]] == ["base", "1-shot", "lora"]
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_another_budget_is_refused_by_name(done: tuple[Path, Result], recipe: Path) -> None:
    folder, _ = done
    result = invoke(recipe, "-o", folder, "--max-steps", 9)
    assert result.exit_code == 2
    assert "training.max_steps was 2 and is now 9" in result.stderr
    result = invoke(recipe, "-o", folder, "--questions", 3)
    assert "questions was None and is now 3" in result.stderr


def test_two_do_not_run_in_one_folder(done: tuple[Path, Result], recipe: Path) -> None:
    folder, _ = done
    with FileLock(folder / ".lock"):
        result = invoke(recipe, "-o", folder)
    assert result.exit_code == 2
    assert "another comparison runs in" in result.stderr


def test_a_dry_run_writes_nothing(recipe: Path) -> None:
    output = recipe.parent / "dry"
    result = invoke(recipe, "-o", output, "--methods", "lora", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(run["candidate"], run["todo"]) for run in found["runs"]] == [("base", 1), ("lora", 1)]
    assert found["seconds"] > 10
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "lorra"], "did you mean 'lora'"),
        (["--shots", "one"], "--shots takes numbers between commas"),
        (["data.held_out=0"], "set data.held_out"),
        (["compare.seedz=3"], "did you mean 'seeds'"),
        (["--price", "RTX 4091"], "did you mean 'rtx 4090'"),
        (["data.train=no-such-file.jsonl"], "no-such-file.jsonl"),
    ],
)
def test_mistakes_are_told_before_anything_runs(recipe: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    result = invoke(recipe, *arguments, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    result = invoke(recipe, "-o", tmp_path)
    assert result.exit_code == 2
    assert "thesis.txt" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_damaged_files_end_in_a_sentence(recipe: Path, done: tuple[Path, Result]) -> None:
    """Each file that a comparison reads again, in some of its damaged forms; a seed is a file's place in the list."""
    folder, _ = done
    files = [
        p for p in sorted(folder.rglob("*")) if p.suffix in (".json", ".jsonl", ".yaml") and "tuned" not in p.parts
    ]
    assert len(files) > 8
    refused = 0
    for seed, path in enumerate(files):
        whole = path.read_bytes()
        for form in random.Random(seed).sample(list(damaged(whole, seed).values()), 6):
            put(path, form)
            try:
                comparison = prepare(recipe, [], {}, folder)
                comparison.report()
                for run in (run for run in comparison.runs if run.candidate.name != BROKEN):
                    result_of(comparison.setup, run, stages_of(comparison.setup, run), [])
                    questions_of(comparison.setup.place(run) / ANSWERS)
            except SlimtuneError:
                refused += 1
            put(path, whole)
    assert refused > len(files)
