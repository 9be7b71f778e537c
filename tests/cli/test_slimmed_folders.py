"""Commands that take a model take one that was slimmed: in integers, or with fewer layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from small_text_model import orders, save_base, write_lines


@pytest.fixture(scope="module", params=["int4", "int8", "pruned"])
def slimmed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, run_module: Any) -> Path:
    root = tmp_path_factory.mktemp("slimmed")
    base = save_base(root / "base")
    how = {
        "int4": ["quantize", base, "--method", "rtn", "--group-size", 32],
        "int8": ["quantize", base, "--scheme", "W8A16"],
        "pruned": ["prune", base, "--layers", 1],
    }[request.param]
    result = run_module(*how, "--output", root / "slim")
    assert result.exit_code == 0, result.output
    return root / "slim"


@pytest.fixture(scope="module")
def run_module() -> Any:
    from typer.testing import CliRunner

    from slimtune.cli import app

    return lambda *words, **options: CliRunner().invoke(app, [str(word) for word in words], **options)


def test_it_is_told_planned_asked_scored_and_served(slimmed: Path, run_module: Any, tmp_path: Path) -> None:
    told = json.loads(run_module("info", slimmed, "--json").stdout)
    base = json.loads(run_module("info", slimmed.parent / "base", "--json").stdout)
    if slimmed_is_quantized := "quantized" in told:
        assert told["quantized"].startswith("W")
        assert told["parameters"] == base["parameters"]
    else:
        assert told["parameters"] < base["parameters"]
    planned = json.loads(run_module("plan", slimmed, "--device", "T4", "--max-length", 16, "--json").stdout)
    assert planned["fits"]
    assert any("stored as W" in note for note in planned["choices"][0]["notes"]) is slimmed_is_quantized

    rows = [{"messages": example.messages()} for example in orders(3)]
    data = write_lines(tmp_path / "rows.jsonl", *rows)
    asked = run_module("generate", slimmed, "hello", "--max-new-tokens", 2)
    assert asked.exit_code == 0, asked.output
    scored = run_module("evaluate", slimmed, data, "--max-new-tokens", 2, "--json")
    assert scored.exit_code == 0, scored.output
    assert json.loads(scored.stdout)["count"] == 3
    chat = run_module("chat", slimmed, "--max-new-tokens", 2, input="hello\n/exit\n")
    assert chat.exit_code == 0, chat.output
    trained = run_module("train", slimmed, data, "-o", tmp_path / "tuned", "--max-steps", 1, "--batch-size", 2)
    assert trained.exit_code == 0, trained.output
