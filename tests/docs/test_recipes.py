"""The page on recipes: its commands run on tiny models, its recipe is one, its tables are complete."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.recipe.recipe import Recipe
from slimtune.recipe.shipped import shipped
from small_text_model import save_base

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
COMMANDS = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^slimtune .*$", PAGE, re.MULTILINE)]
REAL = "smollm2-135m-instruct"


def invoke(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (arguments, result.output)
    return result.output


def test_the_commands_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader would type them, the model tiny and the steps few."""
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base")
    theirs = {"model_name_or_path": "base", "dataset": "orders", "dataset_dir": "ONLINE", "template": "llama3"}
    (tmp_path / "llama3_lora_sft.yaml").write_text(yaml.safe_dump(theirs))
    for command in COMMANDS:
        words = ["base" if word == REAL else word for word in command]
        if words[0] == "demo-data":
            words += ["--train", "20", "--held-out", "2"]
        if "data.train.0.weight=2" in words:
            listed = Path("recipe.yaml").read_text().replace("orders/train.jsonl", "[{path: orders/train.jsonl}]", 1)
            Path("listed.yaml").write_text(listed)
            words[1] = "listed.yaml"
        if words[0] == "train":
            quick = [] if "--max-steps" in words else ["training.max_steps=1"]
            words = [*words[: 3 if words[1] == "base" else 2], *quick, *words[3 if words[1] == "base" else 2 :]]
        if "--resume" in words:
            assert "nothing to resume" in invoke(*words, code=2)
            continue
        invoke(*words, *(["--overwrite"] if words[0] == "train" and "--overwrite" not in words else []))
        if words[:2] == ["recipe", "init"]:
            Path("recipe.yaml").write_text(Path("recipe.yaml").read_text().replace(REAL, "base"))


def test_the_recipe_that_is_shown_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(block)
    recipe = Recipe.read(tmp_path / "recipe.yaml")
    assert recipe.training.learning_rate == 2e-4
    assert recipe.method.config().r == 16


def test_every_recipe_that_ships_is_in_the_table() -> None:
    assert set(re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE)) == set(shipped())


def test_the_keys_that_are_named_are_dealt_with_as_said() -> None:
    from slimtune.recipe.convert import axolotl, llama_factory

    rules = llama_factory.RULES | axolotl.RULES
    for key in ("ddp_timeout", "flash_attn", "wandb_entity"):
        assert rules[key].without_effect
    for key in ("use_galore", "neftune_noise_alpha", "train_on_inputs"):
        assert rules[key].refused
