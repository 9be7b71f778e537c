"""The tuning methods as recipes name them, derived from the registry, and the configs that their fields make."""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from slimtune.errors import ConfigError, did_you_mean
from slimtune.recipe.validation import read_field

FULL, FEATURES = "full", "features"
SPELLINGS = {
    "rank": ("r",),
    "alpha": ("lora_alpha", "alpha"),
    "dropout": ("lora_dropout",),
    "layers": ("layers_to_transform",),
    "init": ("init_lora_weights",),
}
"""What fields are called elsewhere, with the names that methods have for them."""


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
        # From an instance: defaults that `__post_init__` fills in are the ones that a recipe is to show.
        default = dataclasses.asdict(self.config())
        return {name: value for name, value in default.items() if name not in shared | set(self.fixed)}


def methods() -> dict[str, Method]:
    """All methods by name: each registered one, DoRA, and the two that attach nothing."""
    from slimtune.core.config import methods as registered
    from slimtune.data.features import FeatureTuning

    configs = registered()
    known = [Method(_name(peft_type), _first_line(config), config) for peft_type, config in configs.items()]
    # A name of its own, for people look for it by that; `fixed` keeps it from being turned off again.
    known.append(Method("dora", "DoRA: LoRA with use_dora=True.", configs["LORA"], {"use_dora": True}))
    known.append(Method(FULL, str(FullTuning.__doc__), FullTuning))
    known.append(Method(FEATURES, _first_line(FeatureTuning), FeatureTuning))
    return {method.name: method for method in sorted(known, key=lambda method: method.name)}


def names() -> list[str]:
    """The names of all methods, read from their sources: a shell that completes one can't wait for torch."""
    sources = (Path(__file__).parents[1] / "methods").rglob("*.py")
    types = (re.findall(r'peft_type: str \| None = "(\w+)"', path.read_text(encoding="utf-8")) for path in sources)
    return sorted([*map(_name, chain.from_iterable(types)), "dora", FULL, FEATURES])


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


def field_of(method: Method, name: str) -> str:
    """The field of a method that goes by this name, or by another spelling of it; empty if it has none."""
    return next((field for field in (name, *SPELLINGS.get(name, ())) if field in method.fields), "")


def table(method: Method, config: Any) -> dict[str, Any]:
    """The method as the model card shows it: the fields that aren't as they come."""
    default = method.fields
    values = {name: getattr(config, name) for name in default}
    changed = {name: value for name, value in values.items() if value != default[name]}
    return {"method": method.name} | dict(method.fixed) | changed


def _name(peft_type: str) -> str:
    name = peft_type.lower().replace("_", "-")
    # Tuning all weights in place goes by the plain name.
    return "full-adapter" if name == FULL else name


def _stranger(method: Method, name: str, place: str) -> str:
    if name in method.fixed:
        return f"{place}.{name} is what makes {method.name} what it is; leave it out"
    field = field_of(method, name)
    near = f"; did you mean '{field}'?" if field else did_you_mean(name, method.fields)
    return f"unknown key {place}.{name}: {method.name} has no such field" + (
        near or f"; its fields are {', '.join(method.fields) or 'none'}"
    )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(inner) for name, inner in dataclasses.asdict(value).items()}
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, set) else value


def _first_line(config: type) -> str:
    """The first line of the file that a method is."""
    return (sys.modules[config.__module__].__doc__ or "").strip().partition("\n")[0]
