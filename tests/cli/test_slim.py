"""`slimtune quantize`: the written folder is used by the other commands, the report is true, mistakes are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import slimtune
from slimtune.bases.int4 import LinearInt4
from slimtune.bases.int8 import LinearInt8
from small_text_model import write_lines

pytestmark = pytest.mark.filterwarnings("ignore:.*quantiz")


@pytest.fixture(scope="module")
def long_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from small_text_model import orders

    folder = tmp_path_factory.mktemp("data")
    return write_lines(folder / "orders.jsonl", *({"messages": e.messages()} for e in orders(60)))


def test_an_adapter_is_merged_and_quantized_on_its_own_data(
    run: Any, tuned: Path, long_data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "int4"
    result = run("quantize", tuned, "--data", long_data, "--group-size", 32, "--output", output, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["layers"] == 14
    assert 4.4 < report["bits_per_weight"] < 4.6
    assert report["after"]["megabytes"] < report["before"]["megabytes"]
    assert 0 < report["drift"]["relative"] < 0.8
    assert report["readers"] == ["slimtune", "transformers"]
    stored = json.loads((output / "slim_report.json").read_text())
    assert stored == {name: value for name, value in report.items() if name != "output"}
    model, tokenizer = slimtune.load(output)
    assert tokenizer is not None
    assert sum(isinstance(module, LinearInt4) for module in model.modules()) == 14
    answered = run("generate", output, "two lattes", "--max-new-tokens", 4)
    assert answered.exit_code == 0, answered.output


def test_8_bits_take_no_data_and_lose_next_to_nothing(run: Any, base: Path, tmp_path: Path) -> None:
    result = run("quantize", base, "--scheme", "W8A16", "--head", "int8", "--output", tmp_path / "int8")
    assert result.exit_code == 0, result.output
    assert "W8A16 by rtn" in result.stdout
    assert "--head keep" in result.stdout
    plain, _ = slimtune.load(base)
    model, _ = slimtune.load(tmp_path / "int8")
    assert isinstance(model.lm_head, LinearInt8)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        before, after = plain(ids).logits, model(ids).logits
    assert (after - before).norm() < 0.05 * before.norm()
    again = run("quantize", tmp_path / "int8", "--output", tmp_path / "again")
    assert again.exit_code == 2
    assert "quantized already" in again.stderr
    assert not (tmp_path / "again").exists()


def test_mistakes_cost_nothing(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (("--scheme", "W4A61"), "did you mean 'W4A16'"),
        (("--group-size", 128), "take groups of 32 or 64"),
        (("--data", write_lines(tmp_path / "few.jsonl", {"text": "two lattes"})), "at least 1,024"),
        (("--data", tmp_path / "none.jsonl"), "none.jsonl"),
    ):
        result = run("quantize", base, "--output", tmp_path / "out", *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert said in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()
