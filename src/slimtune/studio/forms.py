"""Forms of settings, made of the recipe's schema: what a section has, its help, its defaults; and back, with mistakes.

Nothing is listed here that the schema knows: a setting that is added to a recipe is in the form by itself.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from slimtune.data.formats import FORMATS
from slimtune.data.settings import BAD_ROWS, TOO_LONG
from slimtune.errors import ConfigError, SlimtuneError
from slimtune.models.device import DTYPES
from slimtune.quantization.config import KINDS, TORCHAO_KINDS
from slimtune.recipe.method import FULL, configure, find, methods
from slimtune.recipe.optimizers import OPTIMIZERS
from slimtune.recipe.recipe import Recipe, Task
from slimtune.recipe.shipped import notes_of, shipped, text_of
from slimtune.recipe.training import SCHEDULERS
from slimtune.recipe.validation import read_as
from slimtune.storage.text_files import dump, parse

MODEL, DATA, METHOD, TASK = "model.name", "data.train", "method.name", "task"
DEFAULT_METHOD, AUTO = "lora", "auto"
CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": DTYPES,
    "model.quantize": (*KINDS, *TORCHAO_KINDS),
    "data.too_long": TOO_LONG,
    "data.bad_rows": BAD_ROWS,
    "data.format": (AUTO, *FORMATS),
    "training.optim": OPTIMIZERS,
    "training.scheduler": SCHEDULERS,
}
"""Settings that the schema has as texts, with the library's own lists of what they take."""
_SECTIONS = ("model", "data", "method", "training", "evaluation", "preferences")
"""Of `slimtune train`, in the order of the form; a distillation is another command."""
_LEFT_OUT = frozenset({MODEL, DATA, METHOD, "model.trust_remote_code"})
"""What stands elsewhere in the form; and code from a model's folder, which a page doesn't run."""
_RUNS_CODE = ("evaluation.scorer", "preferences.reward")
"""Settings that may name a function in a file of Python."""
_NEVER_DEFAULT = ("method", "evaluation")
"""Sections in which it matters whether a value is written: alpha follows the rank unless it is, and an evaluation is
made if its section is there."""
_MENTIONED = re.compile(r"\b(\w+)\.(\w+)\b")

_BOOLEANS = ("true", "false")
"""Of a setting that is none of them by default: as the library decides."""

SettingKind = Literal["text", "number", "switch", "choice", "yaml"]


@dataclass(frozen=True)
class Setting:
    """A setting of a recipe as a form shows it.

    Attributes:
        place: as in `training.epochs`.
        default: as YAML, empty for none.
        choices: what it takes, where that is a list.
    """

    place: str
    kind: SettingKind
    default: str
    help: str
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name within its section."""
        return self.place.rpartition(".")[2]

    @property
    def id(self) -> str:
        """The place as an id that needs no escaping in a selector."""
        return self.place.replace(".", "-")

    @property
    def default_value(self) -> Any:
        """The default as `read` gives it; None for none."""
        return self.read(self.default) if self.default else None

    def read(self, text: str) -> Any:
        """The value that a text stands for. Raises: ConfigError."""
        if self.kind in ("text", "choice") and self.choices != _BOOLEANS:
            return text
        try:
            return parse(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"'{text}' is not a value; write a list as [a, b], and a text in quotes") from error


@dataclass(frozen=True)
class Filled:
    """A form as it was filled in.

    Attributes:
        sections: of the recipe, with what was written.
        errors: what is wrong, by place; the empty place is for what concerns no single setting.
        recipe: None where something is wrong.
    """

    sections: Mapping[str, Any]
    errors: Mapping[str, str] = field(default_factory=dict)
    recipe: Recipe | None = None


@lru_cache
def settings_of(section: str, method: str = DEFAULT_METHOD) -> tuple[Setting, ...]:
    """The settings of a section; those of `method` are the fields of the one that is named. Raises: ConfigError."""
    if section == "method":
        chosen = find(method)
        hints, notes, defaults = get_type_hints(chosen.config), notes_of(chosen.config), chosen.fields
        # What a recipe writes where nothing is said: for lora a rank of 16, where peft's own default is 8.
        defaults = defaults | {name: value for name, value in _written(method).items() if name in defaults}
    else:
        kind = Recipe.sections()[section]
        hints, notes = get_type_hints(kind), notes_of(kind)
        defaults = {each.name: _default(each) for each in dataclasses.fields(kind)}
    places = {name: f"{section}.{name}" for name in defaults}
    return tuple(
        _setting(places[name], hints[name], default, notes.get(name, ""))
        for name, default in defaults.items()
        if places[name] not in _LEFT_OUT
    )


def all_settings(method: str = DEFAULT_METHOD) -> dict[str, tuple[Setting, ...]]:
    """The settings of every section of the form. Raises: ConfigError, for an unknown method."""
    return {section: settings_of(section, method) for section in _SECTIONS}


def tasks() -> tuple[str, ...]:
    """What can be learned."""
    return get_args(Task)


def method_names() -> dict[str, str]:
    """The methods, each with its line."""
    return {name: method.summary for name, method in methods().items()}


@lru_cache
def presets() -> dict[str, str]:
    """The shipped recipes of `slimtune train` by name, each with what it is for."""
    return {name: what for name, what in shipped().items() if "compare" not in parse(text_of(name))}


def preset_values(name: str) -> dict[str, str]:
    """A shipped recipe as the texts of a form, by place. Raises: ConfigError."""
    return values_of(parse(text_of(name)))


def values_of(sections: Mapping[str, Any]) -> dict[str, str]:
    """Sections of a recipe as the texts of a form, by place."""
    values: dict[str, str] = {}
    for section, inner in sections.items():
        if section in ("output", "distillation"):
            continue
        if not isinstance(inner, Mapping):
            values[section] = as_text(inner)
            continue
        values |= {f"{section}.{key}": as_text(value) for key, value in inner.items() if value is not None}
    return values


def as_text(value: Any) -> str:
    """A value on one line, as YAML reads it back; a text as it is."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def fill_in(texts: Mapping[str, str], output: str = "") -> Filled:
    """Read a form: a recipe, or everything that is wrong with it.

    Args:
        texts: by place; an empty one is as if it weren't there.
        output: of the recipe.
    """
    texts = {place: text.strip() for place, text in texts.items() if text.strip()}
    method = texts.get(METHOD, DEFAULT_METHOD)
    errors: dict[str, str] = {}
    try:
        known = {setting.place: setting for group in all_settings(method).values() for setting in group}
    except ConfigError as error:
        return Filled({}, {METHOD: str(error)})
    sections: dict[str, Any] = {"model": {}, "data": {}, "method": {"name": method}}
    for place, text in texts.items():
        section, _, key = place.partition(".")
        setting = known.get(place)
        try:
            if place in (MODEL, DATA):
                sections[section][key] = text
            elif place == TASK and text != AUTO:
                sections[TASK] = text
            elif setting is not None:
                value = setting.read(text)
                if section in _NEVER_DEFAULT or value != setting.default_value:
                    sections.setdefault(section, {})[key] = value
        except ConfigError as error:
            errors[place] = str(error)
    errors |= _mistakes(sections) | {place: "" for place in (MODEL, DATA) if place not in texts}
    if errors:
        return Filled(sections, errors)
    try:
        return Filled(sections, {}, Recipe.of(sections | ({"output": output} if output else {})))
    except SlimtuneError as error:
        return Filled(sections, {_place_in(str(error), known): str(error)})


def arguments_of(sections: Mapping[str, Any], output: Path) -> list[str]:
    """What stands behind `slimtune` to train as these sections say."""
    arguments = ["train", sections["model"].get("name", "MODEL"), sections["data"].get("train", "DATA")]
    arguments += ["--output", str(output)]
    if sections["method"]["name"] != DEFAULT_METHOD:
        arguments += ["--method", sections["method"]["name"]]
    if TASK in sections:
        arguments.append(f"task={sections[TASK]}")
    for section, values in sections.items():
        if isinstance(values, Mapping):
            places = {f"{section}.{key}": value for key, value in values.items()}
            arguments += [f"{p}={_argument(value)}" for p, value in places.items() if p not in (MODEL, DATA, METHOD)]
    return arguments


def command_of(arguments: Sequence[str]) -> str:
    """A command as it is typed."""
    return shlex.join(["slimtune", *arguments])


def recipe_text(recipe: Recipe) -> str:
    """A recipe as its file."""
    return dump(recipe.to_dict())


def refuse_code(sections: Mapping[str, Any]) -> dict[str, str]:
    """What would run a file of Python, by place, with the sentence that refuses it."""
    refused = {}
    for place in _RUNS_CODE:
        section, _, key = place.partition(".")
        value = (sections.get(section) or {}).get(key)
        if isinstance(value, str) and ".py:" in value:
            refused[place] = f"{place} names code in a file, which the studio doesn't run; train it in a terminal"
    return refused


def _mistakes(sections: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with single settings, each looked at alone, so that all are found at once."""
    errors = refuse_code(sections)
    needed: dict[str, dict[str, Any]] = {"model": {"name": "model"}, "data": {"train": "data"}}
    for section, values in sections.items():
        if not isinstance(values, Mapping):
            continue
        for key, value in values.items():
            place = f"{section}.{key}"
            try:
                if section == "method" and key != "name":
                    configure(find(values["name"]), {key: value})
                elif section != "method" and place != MODEL:
                    read_as(Recipe.sections()[section], needed.get(section, {}) | {key: value}, section)
            except SlimtuneError as error:
                errors.setdefault(place, str(error).removeprefix(f"{section}: "))
    return errors


def _place_in(sentence: str, known: Mapping[str, Setting]) -> str:
    """The setting that an error is about: the first that it names; empty where it names none."""
    mentioned = (f"{section}.{key}" for section, key in _MENTIONED.findall(sentence))
    return next((place for place in mentioned if place in known), "")


def _argument(value: Any) -> str:
    text = as_text(value)
    # A text that YAML would take for something else is quoted.
    return json.dumps(text, ensure_ascii=False) if isinstance(value, str) and _as_yaml(text) != text else text


def _as_yaml(text: str) -> Any:
    try:
        return parse(text)
    except yaml.YAMLError:
        return None


def _written(method: str) -> dict[str, Any]:
    """The fields that a recipe holds of a method for which nothing is set."""
    if method == FULL:
        return {}
    recipe = Recipe.of({"model": {"name": "model"}, "data": {"train": "data"}, "method": {"name": method}})
    return dict(recipe.method.fields)


def _setting(place: str, hint: Any, default: Any, note: str) -> Setting:
    choices = CHOICES.get(place, ()) or tuple(_literals(hint))
    kinds = {kind for kind in _members(hint) if kind is not type(None)}
    kind: SettingKind
    if choices:
        kind = "choice"
    elif kinds == {bool}:
        kind = "switch" if default is False else "choice"
        choices = () if kind == "switch" else _BOOLEANS
    elif kinds and kinds <= {int, float}:
        kind = "number"
    else:
        kind = "text" if kinds == {str} else "yaml"
    return Setting(place, kind, _default_text(default), note, choices)


def _default_text(default: Any) -> str:
    return "" if default is None or default is dataclasses.MISSING or default in ({}, [], ()) else as_text(default)


def _default(each: dataclasses.Field[Any]) -> Any:
    return each.default_factory() if each.default_factory is not dataclasses.MISSING else each.default


def _members(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        for inner in get_args(hint):
            yield from _members(inner)
    elif get_origin(hint) is Literal:
        yield str
    else:
        yield get_origin(hint) or hint


def _literals(hint: Any) -> Iterator[str]:
    if get_origin(hint) is Literal:
        yield from (value for value in get_args(hint) if isinstance(value, str))
    elif get_origin(hint) in (Union, types.UnionType):
        for inner in get_args(hint):
            yield from _literals(inner)
