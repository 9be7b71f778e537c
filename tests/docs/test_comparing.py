"""The page on comparing: its commands, options and recipe are there, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.metrics.seeds import interval
from slimtune.recipe.candidates import trained
from slimtune.recipe.compare import CompareSettings
from slimtune.recipe.recipe import Recipe
from slimtune.recipe.shipped import shipped

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "comparing.md").read_text()
COMMANDS = re.findall(r"^slimtune ([\w-]+)(.*?)(?:#.*)?$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("command", "arguments"), COMMANDS)
def test_the_commands_take_their_options(command: str, arguments: str) -> None:
    words = [command, "init"] if command == "recipe" else [command]
    shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"}).output
    for option in re.findall(r"--[\w-]+", arguments):
        assert option in shown, (command, option)


def test_options_in_the_text_are_there() -> None:
    shown = CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "200"}).output
    for option in set(re.findall(r"`(--[\w-]+)", PAGE)):
        assert option in shown, option


def test_the_recipe_is_one_and_its_section_is_read() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    values = yaml.safe_load(text)
    Recipe.of(values)
    assert CompareSettings.of(values["compare"]).seeds == 3


def test_variants_that_it_names_can_be_read_and_the_recipe_ships() -> None:
    for name in re.findall(r"`(lora:[^`]+)`", PAGE):
        assert trained(name).method == "lora"
    assert "compare" in shipped()


def test_the_interval_of_all_right_is_the_one_that_it_says() -> None:
    import numpy as np

    assert f"{interval(np.ones((3, 100))).low:.3f} to 1" in PAGE


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", PAGE)
    assert links
    for target in links:
        assert (DOCS / target).exists(), target
