"""The tuning methods as the command line names them, derived from the registry, and their options as a config."""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import yaml

from slimtune.errors import ConfigError, did_you_mean, listing
from slimtune.recipe.validation import read_field, type_name
from slimtune.storage.text_files import parse

FULL, FEATURES = "full", "features"
INITS: dict[str, bool | str] = {"default": True, "random": False}

OPTIONS = {
    "rank": ("r",),
    "alpha": ("lora_alpha", "alpha"),
    "dropout": ("lora_dropout",),
    "target_modules": ("target_modules",),
    "exclude_modules": ("exclude_modules",),
    "layers": ("layers_to_transform",),
    "rank_pattern": ("rank_pattern",),
    "alpha_pattern": ("alpha_pattern",),
    "modules_to_save": ("modules_to_save",),
    "bias": ("bias",),
    "init": ("init_lora_weights",),
    "use_rslora": ("use_rslora",),
}
"""Options of `train` with the field that each sets; a method takes those whose field it has."""


@dataclass
class FullTuning:
    """Full tuning in place: all weights are trained, and the whole model is written."""

    learning_rate: ClassVar[float] = 2e-5


@dataclass(frozen=True)
class Method:
    """A tuning method: its name here, one line of what it does, its config, and the fields that its name decides."""

    name: str
    summary: str
    config: Any
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        """Whether it attaches deltas to a frozen base."""
        return self.name not in (FULL, FEATURES)

    @property
    def in_peft(self) -> bool:
        """Whether `peft` reads the adapters of this method."""
        return self.is_adapter and self.config.in_peft

    @property
    def has_low_rank_pair(self) -> bool:
        """Whether LoRA+ can tell its A from its B."""
        return self.is_adapter and self.config().peft_type == "LORA"

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that can be set, with their defaults."""
        from slimtune.core.config import PeftConfig

        shared = {field.name for field in dataclasses.fields(PeftConfig)} if self.is_adapter else set()
        default = dataclasses.asdict(self.config())
        return {name: value for name, value in default.items() if name not in shared | set(self.fixed)}


def methods() -> dict[str, Method]:
    """All methods by name: each registered one, DoRA, and the two that attach nothing."""
    from slimtune.core.config import methods as registered
    from slimtune.data.features import FeatureTuning

    configs = registered()
    found = [Method(_name(peft_type), _first_line(config), config) for peft_type, config in configs.items()]
    found.append(Method("dora", "DoRA: LoRA with use_dora=True.", configs["LORA"], {"use_dora": True}))
    found.append(Method(FULL, str(FullTuning.__doc__), FullTuning))
    found.append(Method(FEATURES, _first_line(FeatureTuning), FeatureTuning))
    return {method.name: method for method in sorted(found, key=lambda method: method.name)}


def find(name: str) -> Method:
    """The method of that name; raises ConfigError with the nearest."""
    known = methods()
    if name not in known:
        near = did_you_mean(name, known) or f"; there are {', '.join(sorted(known))}"
        raise ConfigError(f"no method '{name}'{near}")
    return known[name]


def configure(method: Method, fields: Mapping[str, Any], base: str = "", place: str = "method") -> Any:
    """The config that these fields make, the others as the method has them; raises ConfigError.

    Args:
        base: whose tokenizer a prompt is read with that begins as a text.
        place: where the fields stand, for a mistake in them.
    """
    hints = typing.get_type_hints(method.config)
    for name in fields:
        if name not in method.fields:
            raise ConfigError(_stranger(method, name, place))
    values = {name: read_field(hints[name], value, f"{place}.{name}") for name, value in fields.items()}
    if method.has_low_rank_pair:
        # The same scale of 2 for every rank.
        values.setdefault("r", 16)
        values.setdefault("lora_alpha", 2 * values["r"])
    if base and "tokenizer_name_or_path" in method.fields and values.get("tokenizer_name_or_path") is None:
        values["tokenizer_name_or_path"] = base
    return method.config(**values, **method.fixed)


def plain_fields(method: Method, config: Any) -> dict[str, Any]:
    """All fields that can be set, as `configure` reads them from a file."""
    return {name: _plain(getattr(config, name)) for name in method.fields}


def options_as_fields(method: Method, options: Mapping[str, Any], assignments: Sequence[str] = ()) -> dict[str, Any]:
    """The fields that options of the command line and `NAME=VALUE` assignments set; raises ConfigError.

    Args:
        options: those that were given, by the names in OPTIONS.
    """
    known = method.fields
    field_of = {option: next((name for name in OPTIONS[option] if name in known), "") for option in options}
    strangers = [option for option, name in field_of.items() if not name]
    if strangers:
        raise ConfigError(
            f"{_options(strangers)} would change nothing with --method {method.name}; leave it out, or choose a "
            f"method that has it (slimtune methods lists them)"
        )
    values = {field_of[option]: _read_option(option, value) for option, value in options.items()}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set takes NAME=VALUE, found '{assignment}'; pass for example {_example(known)}")
        if name not in known:
            near = did_you_mean(name, known) or f"; its fields are {', '.join(known) or 'none'}"
            raise ConfigError(f"--set names '{name}', which {method.name} has no field for{near}")
        if name in values:
            raise ConfigError(f"'{name}' is set twice, the second time to '{text}'; set it once")
        values[name] = _read(method.config, name, text)
    return values


def table(method: Method, config: Any) -> dict[str, Any]:
    """The method as the model card shows it: the fields that aren't as they come."""
    default = method.fields
    values = {name: getattr(config, name) for name in default}
    changed = {name: value for name, value in values.items() if value != default[name]}
    return {"method": method.name} | dict(method.fixed) | changed


def names_or_regex(value: str) -> list[str] | str:
    """`all-linear` and regular expressions as they are, anything else as names between commas."""
    if value == "all-linear" or re.search(r"[*+?()\[\]|^$\\]", value):
        return value
    return _names(value)


def _name(peft_type: str) -> str:
    name = peft_type.lower().replace("_", "-")
    # Tuning all weights in place goes by the plain name.
    return "full-adapter" if name == FULL else name


def _read_option(option: str, value: Any) -> Any:
    if option in ("target_modules", "exclude_modules"):
        return names_or_regex(value)
    if option == "layers":
        return _numbers(value)
    if option == "rank_pattern":
        return {name: int(number) for name, number in _pairs(value, "rank-pattern")}
    if option == "alpha_pattern":
        return dict(_pairs(value, "alpha-pattern"))
    if option == "modules_to_save":
        return _names(value)
    return INITS.get(value, value) if option == "init" else value


def _read(config: Any, name: str, text: str) -> Any:
    """A value as YAML if that has the field's type, else the text as it stands; raises ConfigError."""
    hint = typing.get_type_hints(config)[name]
    try:
        candidates = [parse(text), text]
    except yaml.YAMLError:
        candidates = [text]
    for candidate in candidates:
        try:
            read_field(hint, candidate, name)
        except ConfigError:
            continue
        return candidate
    raise ConfigError(f"--set {name} takes {type_name(hint)}, found '{text}'")


def _stranger(method: Method, name: str, place: str) -> str:
    if name in method.fixed:
        return f"{place}.{name} is what makes {method.name} what it is; leave it out"
    field = next((field for field in OPTIONS.get(name, ()) if field in method.fields), None)
    near = f"; did you mean '{field}'?" if field else did_you_mean(name, method.fields)
    return f"unknown key {place}.{name}: {method.name} has no such field" + (
        near or f"; slimtune methods {method.name} lists them"
    )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(inner) for name, inner in dataclasses.asdict(value).items()}
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, set) else value


def _example(known: Mapping[str, Any]) -> str:
    return next((f"{name}={value}" for name, value in known.items() if value is not None), "r=8")


def _options(names: Sequence[str]) -> str:
    return listing("--" + name.replace("_", "-") for name in names)


def _first_line(config: type) -> str:
    """The first line of the file that a method is."""
    return (sys.modules[config.__module__].__doc__ or "").strip().partition("\n")[0]


def _names(value: str) -> list[str]:
    return [name.strip() for name in value.split(",") if name.strip()]


def _numbers(value: str) -> list[int]:
    try:
        return [int(number) for number in value.split(",")]
    except ValueError as error:
        raise ConfigError(f"--layers takes numbers between commas, found '{value}'; pass for example 0,1,2") from error


def _pairs(values: Sequence[str], option: str) -> list[tuple[str, float]]:
    found = []
    for value in values:
        name, _, number = value.rpartition("=")
        try:
            found.append((name, float(number)))
        except ValueError:
            name = ""
        if not name:
            raise ConfigError(f"--{option} takes NAME=NUMBER, found '{value}'; pass for example q_proj=4")
    return found
