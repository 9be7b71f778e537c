"""The recipes that ship, and the same with every other key beside them, commented out."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slimtune.errors import ConfigError, did_you_mean

FOLDER = Path(__file__).with_name("recipes")


def shipped() -> dict[str, str]:
    """What each recipe is for, by its name."""
    return {path.stem: _summary(path) for path in sorted(FOLDER.glob("*.yaml"))}


def text_of(name: str) -> str:
    """A recipe as it ships; raises ConfigError with the nearest name."""
    known = shipped()
    if name not in known:
        near = did_you_mean(name, known) or f"; there are {', '.join(known)}"
        raise ConfigError(f"no recipe '{name}' ships{near}")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def commented(name: str) -> str:
    """A recipe with all keys: the defaults stand commented out in their sections."""
    from slimtune.recipe.recipe import Recipe
    from slimtune.storage.text_files import parse

    text = text_of(name)
    given, defaults = parse(text), Recipe.of(parse(text)).to_dict()
    notes = {section: notes_of(kind) for section, kind in Recipe.sections().items()}
    lines: list[str] = []
    for section, block in _blocks(text):
        lines += block
        if isinstance(defaults.get(section), Mapping):
            unset = {key: value for key, value in defaults[section].items() if key not in given[section]}
            lines += _as_comments(unset, notes.get(section, {}))
    return "\n".join(lines) + "\n"


def notes_of(kind: type) -> dict[str, str]:
    """What the docstring of a dataclass says of its fields, in its section of arguments or attributes."""
    body = re.split(r"^(?:Args|Attributes):\n", inspect.cleandoc(kind.__doc__ or ""), flags=re.MULTILINE)[1:]
    # The docstring is the one place where a field is described; recipes, options and docs all quote it.
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", body[0] if body else "", flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """The lines of each section, with what stands above the first one."""
    block: list[str] = []
    for line in text.rstrip("\n").split("\n"):
        if re.match(r"\w", line) and block:
            yield block[0].partition(":")[0], block
            block = []
        block.append(line)
    yield block[0].partition(":")[0], block


def _as_comments(values: Mapping[str, Any], notes: Mapping[str, str]) -> Iterator[str]:
    from slimtune.storage.text_files import dump

    for key, value in values.items():
        if key in notes:
            yield from (f"  # {line}" for line in textwrap.wrap(notes[key], 110))
        yield from (f"  #{line}" for line in dump({key: value}).splitlines())


def _summary(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()
