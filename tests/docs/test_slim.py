"""The page on pruning and distilling: its Python runs, and its commands, options and defaults are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.recipe.distillation import TOP_K, DistillationSettings
from slimtune.slim.prune import CALIBRATION_TOKENS
from slimtune.slim.width import MULTIPLE

PAGE = (Path(__file__).parents[2] / "docs" / "slim.md").read_text()


def code(language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [text for name, text in blocks if name == language]


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for snippet in code("python"):
        exec(compile(snippet, "slim.md", "exec"), {})
    assert (tmp_path / "smaller" / "model.safetensors").is_file()


def test_commands_and_options_exist() -> None:
    shown = ""
    for line in (shlex.split(line) for block in code("") for line in block.splitlines()):
        assert line[0] == "slimtune"
        own = CliRunner().invoke(app, [line[1], "--help"], env={"COLUMNS": "200"}).output
        assert all(word in own for word in line if word.startswith("--")), line
        shown += own
    for option in re.findall(r"`(--[a-z-]+)", PAGE):
        assert option in shown, option


def test_defaults_and_figures_are_those_of_the_code() -> None:
    table = dict(re.findall(r"^\| `--([a-z-]+)` \| ([\d.]+) \|", PAGE, re.MULTILINE))
    assert int(table.pop("top-k")) == TOP_K
    for name, value in table.items():
        assert getattr(DistillationSettings("teacher"), name) == float(value), name
    assert f"{CALIBRATION_TOKENS:,} tokens" in PAGE
    assert f"in steps of {MULTIPLE}" in PAGE
    # ids in 2 or 4 bytes, log-probabilities in 2, and the rest's mass.
    assert all(f"{TOP_K * (size + 2) + 2}" in PAGE for size in (2, 4))


def test_the_recipe_is_one() -> None:
    import yaml

    from slimtune.recipe.validation import read_as
    from slimtune.slim.recipe import SlimRecipe, shipped

    (text,) = code("yaml")
    assert read_as(SlimRecipe, yaml.safe_load(text)).steps
    assert all(f"`{name}`" in PAGE for name in shipped())
