"""The dtype in which each command loads a base in bf16: as this processor computes it, or as it is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.models import load
from slimtune.models.device import is_emulated
from slimtune.pipeline import train
from small_text_model import orders, save_half_base, write_lines

HERE = "float32" if is_emulated("bfloat16", "cpu") else "bfloat16"
STEPS = ["--max-steps", 2, "--rank", 4, "--batch-size", 2, "--no-plan", "model.device=cpu"]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_half_base(tmp_path_factory.mktemp("half") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    return write_lines(folder / "train.jsonl", *({"messages": e.messages()} for e in orders(6)))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The dtypes of the models that are loaded, in their order."""
    dtypes: list[str] = []
    read = load._read_model

    def watched(*arguments: Any, **options: Any) -> Any:
        model = read(*arguments, **options)
        dtypes.append(str(model.dtype).removeprefix("torch."))
        return model

    monkeypatch.setattr(load, "_read_model", watched)
    return dtypes


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, half: Path, rows: Path) -> Path:
    output = tmp_path_factory.mktemp("adapters") / "tuned"
    words = ["train", half, rows, "--output", output, *STEPS]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return output


def test_training(run: Any, half: Path, rows: Path, tmp_path: Path, loaded: list[str]) -> None:
    result = run("train", half, rows, "--output", tmp_path / "auto", *STEPS)
    assert result.exit_code == 0, result.output
    assert ("computed in float32, for this processor only emulates bfloat16" in result.output) == (HERE == "float32")
    result = run("train", half, rows, "--output", tmp_path / "asked", *STEPS, "model.dtype=bfloat16")
    assert result.exit_code == 0, result.output
    assert ("only emulates bfloat16: with model.dtype=float32" in result.output) == (HERE == "float32")
    assert loaded == [HERE, "bfloat16"]
    # A recipe is for other machines, too.
    assert "dtype: auto" in (tmp_path / "auto" / "recipe.yaml").read_text()


def test_answering(run: Any, half: Path, rows: Path, adapter: Path, loaded: list[str]) -> None:
    short = ["--max-new-tokens", 2, "--device", "cpu"]
    commands: list[tuple[list[Any], str]] = [
        (["generate", half, "hi", "--adapter", adapter, *short], ""),
        (["chat", adapter, *short], "hi\n/exit\n"),
        (["evaluate", adapter, rows, *short], ""),
        (["forgetting", adapter, "--texts", 1, "--device", "cpu"], ""),
    ]
    for number, (words, typed) in enumerate(commands):
        result = run(*words, stdin=typed)
        assert result.exit_code == 0, result.output
        assert loaded[number:] == [HERE], words
    assert run("generate", half, "hi", *short, "--dtype", "bfloat16").exit_code == 0
    assert loaded[-1] == "bfloat16"


def test_what_is_written_stays_as_stored(
    run: Any, half: Path, adapter: Path, tmp_path: Path, loaded: list[str]
) -> None:
    commands = [
        ["merge", adapter, "--output", tmp_path / "merged"],
        ["quantize", half, "--output", tmp_path / "quantized", "--scheme", "W8A16"],
        ["export", adapter, "--output", tmp_path / "exported", "--to", "hf"],
    ]
    for words in commands:
        result = run(*words, "--device", "cpu")
        assert result.exit_code == 0, result.output
    assert set(loaded) == {"bfloat16"}
    stored = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert stored["dtype"] == "bfloat16"
    # What is stored in codes has them read as they are by what writes one token after the other.
    assert run("generate", tmp_path / "quantized", "hi", "--max-new-tokens", 2, "--device", "cpu").exit_code == 0
    assert loaded[-1] == "bfloat16"


def test_the_plan_is_of_what_is_trained(run: Any, half: Path, rows: Path, tmp_path: Path) -> None:
    result = run("plan", half, "--data", rows, "--device", "cpu", "--method", "lora", "--base", "dense", "--json")
    assert result.exit_code == 0, result.output
    planned = json.loads(result.stdout)
    assert planned["dtype"] == HERE
    assert "model.dtype" not in planned["choices"][0]["command"]
    shown = run("plan", half, "--data", rows, "--device", "cpu", "--method", "lora", "--base", "dense").output
    assert ("computed in float32, for this processor only emulates bfloat16" in shown) == (HERE == "float32")
    elsewhere = json.loads(run("plan", half, "--data", rows, "--device", "RTX 3060", "--json").stdout)
    assert elsewhere["dtype"] == "bfloat16"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{name: {half}, device: cpu}}\ndata: {{train: {rows}}}\noutput: {tmp_path / 'out'}\n")
    checked = run("recipe", "check", recipe)
    assert checked.exit_code == 0, checked.output
    assert ("computed in float32" in checked.output) == (HERE == "float32")


@pytest.mark.skipif(HERE == "bfloat16", reason="this processor computes in bfloat16")
def test_a_run_goes_on_in_the_dtype_that_it_was_begun_in(
    run: Any, half: Path, rows: Path, tmp_path: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    for begun in ("bfloat16", "float32"):
        output, steps = tmp_path / begun, [*STEPS, "training.save_steps=1"]
        with monkeypatch.context() as context:
            context.setattr(train, "_write", breaks)
            dtype = ["model.dtype=bfloat16"] if begun == "bfloat16" else []
            assert run("train", half, rows, "--output", output, *steps, *dtype).exit_code != 0
        facts = output.with_name(f"{begun}.run") / "run.json"
        kept = json.loads(facts.read_text())
        assert kept["recipe"]["model"]["dtype"] == begun
        if begun == "bfloat16":
            # Earlier versions kept what the recipe said, and loaded what was stored.
            kept["recipe"]["model"]["dtype"] = "auto"
            facts.write_text(json.dumps(kept))
        result = run("train", half, rows, "--output", output, *steps, "--resume")
        assert result.exit_code == 0, result.output
        assert loaded[-1] == begun
