"""What a library is missing for is said at once, with the extra that brings it: before anything is read or computed."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from slimtune.cli import app
from slimtune.cli.doctor import FEATURES
from small_text_model import save_base

RECIPE = """\
model: {name: base}
data: {train: rows.jsonl, held_out: 0.2}
compare: {methods: [lora, qlora], seeds: 1}
output: tuned
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base")
    rows = [{"prompt": f"say {number}", "completion": str(number)} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def typed(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize(
    ("library", "extra", "words"),
    [
        ("bitsandbytes", "quantized", "plan base --base nf4"),
        ("bitsandbytes", "quantized", "plan base training.optim=adamw_8bit"),
        ("bitsandbytes", "quantized", "plan --table"),
        ("torchao", "torchao", "plan base --base int8-torchao"),
        ("bitsandbytes", "quantized", "train base rows.jsonl --output made --quantize nf4"),
        ("accelerate", "quantized", "quantize base --output made"),
        ("bitsandbytes", "quantized", "compare recipe.yaml --output made"),
        ("jinja2", "compare", "compare recipe.yaml --output made"),
        ("matplotlib", "compare", "compare recipe.yaml --output made --dry-run"),
        ("scipy", "compare", "compare recipe.yaml --output made"),
    ],
)
def test_a_library_that_is_missing_is_named_before_any_work(
    library: str, extra: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    result = typed(*words.split())
    assert result.exit_code == 2, result.output
    said = " ".join(result.stderr.split())
    assert f"needs {library}: run `pip install 'slimtune[{extra}]'`" in said
    assert len(said.split(". ")) == 1
    assert not (folder / "made").exists()


def test_a_plan_without_bitsandbytes_says_what_it_leaves_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = typed("plan", "base", "--device", "RTX 3060", "--method", "lora", "--max-length", "16")
    assert result.exit_code == 0, result.output
    assert "left out: a base in int8, nf4, which needs bitsandbytes" in " ".join(result.output.split())
    assert "run it:" in result.output
    assert "NF4" not in result.output


def test_doctor_knows_every_extra() -> None:
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert FEATURES.keys() == declared["optional-dependencies"].keys() - {"dev", "docs", "all"}
