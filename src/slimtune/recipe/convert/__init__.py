"""Recipes from the files of other tools: every key is translated, or said to change nothing here, or refused."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimtune.errors import ConfigError
from slimtune.recipe.convert import axolotl, llama_factory
from slimtune.recipe.convert.rules import Imported
from slimtune.recipe.recipe import Recipe
from slimtune.storage.text_files import dump, read_mapping

ORDER = ("task", "model", "data", "method", "preferences", "training", "output")
TOOLS = {tool.NAME: tool for tool in (llama_factory, axolotl)}


def import_recipe(path: str | Path) -> Imported:
    """The recipe that a file of LLaMA-Factory or Axolotl stands for; raises ConfigError with every key at fault."""
    path = Path(path)
    values = read_mapping(path, "file")
    recipe = TOOLS[tool_of(values, path)].translate(values, path.parent)
    Recipe.of(recipe.sections)
    return recipe


def text_of(recipe: Imported, source: str) -> str:
    """The recipe as a file that says where it comes from, and what is not quite the same."""
    said = [f"# From {source} of {recipe.tool}."]
    for key, what in recipe.different.items():
        said += [f"# {line}" for line in textwrap.wrap(f"Not quite the same: {key}: {what}.", 110)]
    kinds = Recipe.sections()
    sections = {name: _in_order(recipe.sections[name], kinds.get(name)) for name in ORDER if name in recipe.sections}
    return "\n".join(said) + "\n\n" + dump(sections)


def _in_order(section: Any, kind: type | None) -> Any:
    """The keys of a section as they are declared."""
    declared = getattr(kind, "__dataclass_fields__", {})
    if not declared:
        return section
    return {
        key: section[key]
        for key in [*(k for k in declared if k in section), *(k for k in section if k not in declared)]
    }


def tool_of(values: Mapping[str, Any], path: Path) -> str:
    """Whose file it is, by the key that names its model; raises ConfigError."""
    named = [name for name, tool in TOOLS.items() if tool.MODEL in values]
    if len(named) == 1:
        return named[0]
    if {"model", "data"} <= values.keys():
        raise ConfigError(f"{path} is a recipe already; train it with slimtune train {path}")
    keys = " and ".join(f"{tool.MODEL} as {name} has" for name, tool in TOOLS.items())
    raise ConfigError(f"{path} is of no tool known here: it needs {keys}, and one of the two only")
