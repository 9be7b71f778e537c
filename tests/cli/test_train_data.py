"""Recipes with data of several kinds, from the file to the written adapter: mixed, packed, streamed, held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from small_text_model import orders, tiny_tokenizer, write_lines


@pytest.fixture
def recipe(base: Path, data: Path, tmp_path: Path) -> Path:
    """Two sources with weights, and one held out."""
    rows = [{"instruction": e.sentence, "output": e.order.to_json()} for e in orders(30)[24:]]
    other = write_lines(tmp_path / "alpaca.jsonl", *rows)
    held_out = write_lines(tmp_path / "held_out.jsonl", *({"messages": e.messages()} for e in orders(34)[30:]))
    path = tmp_path / "recipe.yaml"
    sections = {
        "model": {"name": str(base)},
        "data": {
            "train": [{"path": str(data), "weight": 2}, {"path": str(other), "weight": 1}],
            "held_out": str(held_out),
            "max_length": 400,
        },
        "method": {"name": "lora", "target_modules": "all-linear"},
        "training": {"max_steps": 6, "batch_size": 2, "learning_rate": 0.01},
        "output": str(tmp_path / "out"),
    }
    path.write_text(json.dumps(sections))
    return path


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], ["of its 6 examples an epoch takes 10 (weight 1)", "data: 30 examples", "4 examples held out"]),
        (["data.packing=true"], ["packed into ", "rows of at most 400 tokens"]),
        (["data.streaming=true"], ["neither examples nor tokens are counted", "examples read: "]),
        (["data.streaming=true", "data.packing=true"], ["drawn by weight 2", "examples read: "]),
    ],
)
def test_a_recipe_trains_on_its_data(
    run: Any, recipe: Path, tmp_path: Path, settings: list[str], said: list[str]
) -> None:
    result = run("train", recipe, *settings)
    assert result.exit_code == 0, result.output
    for part in said:
        assert part in result.stdout
    steps = [json.loads(line) for line in (tmp_path / "out" / "loss.jsonl").read_text().splitlines()]
    assert sum("loss" in step for step in steps) == 6
    assert any("eval_loss" in step for step in steps)
    assert "alpaca.jsonl" in (tmp_path / "out" / "README.md").read_text()


def test_a_template_of_ones_own_is_kept_with_the_result(run: Any, recipe: Path, tmp_path: Path) -> None:
    assert run("train", recipe, "data.chat_template=plain", "training.max_steps=1").exit_code == 0
    from slimtune.models.load import load_tokenizer

    kept: Any = load_tokenizer(str(tmp_path / "out"))
    assert kept.chat_template.startswith("{%- for message in messages %}{{ '### '")
    assert kept.chat_template != tiny_tokenizer().chat_template


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.streaming=true", "training.max_steps=null"], "training.max_steps"),
        (["data.streaming=true", "data.held_out=0.5"], "can't be held out of a stream"),
        (["data.too_long=split"], "split is for texts"),
        (["data.chat_template=chatlm"], "did you mean 'chatml'?"),
    ],
)
def test_what_can_not_be(run: Any, recipe: Path, tmp_path: Path, settings: list[str], said: str) -> None:
    result = run("train", recipe, *settings)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_sample_longer_than_the_model(run: Any, base: Path, tmp_path: Path) -> None:
    long = write_lines(tmp_path / "long.jsonl", {"prompt": "tea " * 400, "completion": "two"})
    result = run("train", base, long, "--output", tmp_path / "out", "--max-length", 100_000)
    assert result.exit_code == 2
    assert "the model has 512 positions" in result.stderr


FAQ = "frage;antwort\n" + "".join(f"How many is {n}?;{n} teas\n" for n in range(6))


def test_columns_are_named_by_an_option_or_a_key(run: Any, base: Path, tmp_path: Path) -> None:
    faq = tmp_path / "faq.csv"
    faq.write_text(FAQ)
    named = ["--field", "prompt=frage", "--field", "completion=antwort"]
    steps = ["--max-steps", 1, "--batch-size", 2]
    result = run("train", base, faq, *named, *steps, "--output", tmp_path / "one")
    assert result.exit_code == 0, result.output
    assert f"{faq}: faq.csv is separated by semicolons" in result.stdout
    keys = ["data.fields.prompt=frage", "data.fields.completion=antwort"]
    assert run("train", base, faq, *keys, *steps, "--output", tmp_path / "two").exit_code == 0
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second
    again = run("train", tmp_path / "one" / "recipe.yaml", "--output", tmp_path / "three")
    assert again.exit_code == 0, again.output
    planned = run("plan", base, "--data", faq, *named, "--method", "lora", "--json")
    assert planned.exit_code == 0, planned.output
    assert "--field prompt=frage --field completion=antwort" in json.loads(planned.stdout)["choices"][0]["command"]
    scored = run("evaluate", tmp_path / "one", faq, *named, "--limit", 1, "--json")
    assert scored.exit_code == 0, scored.output
    looked = run("data", "preview", faq, *named)
    assert "format prompt-completion, 6 rows" in looked.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--field", "prompt"], "--field takes NAME=COLUMN, found 'prompt'"),
        (["--field", "prompt=frage", "--field", "prompt=antwort"], "names prompt twice (frage and antwort)"),
        (["--field", "prompt=fragen"], "has no column 'fragen', which fields names; it has antwort, frage; did you"),
        (["--field", "prompt=frage", "data.fields.prompt=antwort"], "data.fields.prompt: 'prompt' is set twice"),
        ([], "rename the columns, or say which is which, as in --field prompt=COLUMN"),
    ],
    ids=str,
)
def test_columns_that_can_not_be_named_so(run: Any, base: Path, tmp_path: Path, words: list[str], said: str) -> None:
    faq = tmp_path / "faq.csv"
    faq.write_text(FAQ)
    result = run("train", base, faq, *words, "--output", tmp_path / "out")
    assert result.exit_code != 0
    assert said in result.output
    for command in (["plan", base, "--field", "prompt=frage"], ["evaluate", base, "reasoning-gym:chain_sum"]):
        refused = run(*command, "--field", "prompt=frage")
        assert "--field" in refused.output
        assert refused.exit_code != 0


def test_bad_rows_are_skipped_and_told(run: Any, base: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *[{"question": "tea?", "answer": "yes"}] * 4, {"question": "tea?"})
    steps = ["--max-steps", 1, "--batch-size", 2, "--output", tmp_path / "out"]
    assert "line 5 has no column 'answer'" in run("train", base, path, *steps).output
    result = run("train", base, path, *steps, "data.bad_rows=skip")
    assert result.exit_code == 0, result.output
    assert "1 row skipped" in result.stdout
    assert "line 5 has no column 'answer'" in result.stdout
    looked = run("data", "preview", path, "--skip-bad-rows", "--json")
    assert "1 row skipped" in json.loads(looked.stdout)["notes"][0]
