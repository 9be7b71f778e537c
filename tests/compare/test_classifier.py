"""A whole comparison of classifiers on a tiny encoder: no prompts, no forgetting, and a page that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from slimtune.cli import app
from small_encoder import reviews, save_encoder
from small_text_model import save_base, write_lines


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifiers")
    train = write_lines(folder / "train.jsonl", *reviews(32), *reviews(2, labels=("good", "good")))
    held_out = write_lines(folder / "held_out.jsonl", *reviews(12, seed=5))
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {{name: {save_encoder(folder / 'base')}}}\n"
        f"data: {{train: {train}, held_out: {held_out}}}\n"
        "method: {name: lora, r: 2}\n"
        "training: {max_steps: 20, batch_size: 8, learning_rate: 0.01}\n"
        "compare: {methods: [full, lora], seeds: 2}\n"
    )
    return path


@pytest.fixture(scope="module")
def done(recipe: Path) -> tuple[Path, Result]:
    return recipe.parent / "out", invoke(recipe, "-o", recipe.parent / "out", "--json")


@pytest.mark.slow
def test_each_method_is_trained_and_judged(done: tuple[Path, Result]) -> None:
    folder, result = done
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["scorer"] == "accuracy"
    assert [row["candidate"] for row in found["candidates"]] == ["full", "lora"]
    for row in found["candidates"]:
        assert row["runs"] == {"wanted": 2, "done": 2, "failed": []}
        assert row["score"]["questions"] == 12
        own = [
            json.loads((folder / f"runs/{row['candidate']}-seed-{seed}/evaluate.json").read_text()) for seed in (0, 1)
        ]
        assert row["score"]["mean"] == pytest.approx(sum(one["scores"]["accuracy"] for one in own) / 2)
        assert row["size_bytes"] > 1000
    assert max(row["score"]["mean"] for row in found["candidates"]) > 0.7, "nothing was learned"


@pytest.mark.slow
def test_what_is_left_out_is_told(done: tuple[Path, Result]) -> None:
    folder, result = done
    found = json.loads(result.stdout)
    assert found["notes"] == []
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for said in ("Always answering 'good'", "right on 0.500", "can't be prompted", "Forgetting has no measure here"):
        assert any(said in remark for remark in found["remarks"]), said
        assert said in result.stderr
        assert said in text
        assert said.replace("'", "&#39;") in page
    assert "What was forgotten" not in page
    assert {finding["claim"][:10] for finding in found["findings"]} == {"LoRA learn", "Full tunin"}


@pytest.mark.slow
def test_spectra_are_of_the_encoder_and_not_of_the_new_head(done: tuple[Path, Result]) -> None:
    folder, _ = done
    for name in ("full", "lora"):
        found = json.loads((folder / f"runs/{name}-seed-0/spectra.json").read_text())
        assert not any("classifier" in matrix["name"] for matrix in found["matrices"])
        assert all(matrix["name"].startswith("bert.") for matrix in found["matrices"])
        assert not (folder / f"runs/{name}-seed-1/spectra.json").exists()


@pytest.mark.slow
def test_answers_stand_side_by_side(done: tuple[Path, Result]) -> None:
    folder, _ = done
    page = (folder / "report.html").read_text()
    assert reviews(12, seed=5)[0]["text"] in page


@pytest.mark.slow
def test_the_same_again_runs_nothing_and_other_data_is_refused(done: tuple[Path, Result], recipe: Path) -> None:
    folder, _ = done
    times = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*.json")}
    again = invoke(recipe, "-o", folder, "--json")
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in times} == times
    train = recipe.parent / "train.jsonl"
    before = train.read_text()
    train.write_text(before.replace("film", "plot"))
    refused = invoke(recipe, "-o", folder)
    train.unlink()
    gone = invoke(recipe, "-o", folder)
    train.write_text(before)
    assert refused.exit_code == 2
    assert "train.jsonl has changed since" in refused.stderr
    assert gone.exit_code == 0, "what was written down is all that is needed"


def test_a_dry_run_knows_the_runs(recipe: Path, tmp_path: Path) -> None:
    result = invoke(recipe, "-o", tmp_path / "out", "--methods", "lora", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(run["candidate"], run["todo"]) for run in found["runs"]] == [("lora", 2)]
    assert found["seconds"] > 10
    assert "can't be prompted" in str(found["remarks"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shots", "0,4"], "the model writes no text"),
        (["--texts", "4"], "compare.texts would change nothing for data with labels"),
        (["--scorer", "json"], "labels are judged by their accuracy"),
        (["model.name=no-such-model"], "no model 'no-such-model'"),
    ],
)
def test_what_makes_no_sense_is_refused(recipe: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    result = invoke(recipe, *arguments, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_that_writes_text_is_prompted_with_labels_too(recipe: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    prompts = [f"model.name={base}", "--methods", "", "--shots", "0", "-o", tmp_path / "out", "--json"]
    result = invoke(recipe, *prompts)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["candidate"] for row in found["candidates"]] == ["base"]
    assert found["scorer"] == "accuracy"
    answers = (tmp_path / "out/runs/base-seed-0/answers.jsonl").read_text().splitlines()
    assert {json.loads(line)["answer"] for line in answers} <= {"good", "bad"}
    assert not any("can't be prompted" in remark for remark in found["remarks"])
