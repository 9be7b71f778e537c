"""Values from a file as the type that a field has, without casts; a mistake is said with its place and the nearest."""

from __future__ import annotations

import json
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from slimtune.errors import ConfigError, did_you_mean

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", strict=True)
"""What a dataclass that is read from a file carries as `__pydantic_config__`; those within it take it over."""

_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "path_type": "a path",
    "bool_type": "true or false",
    "list_type": "a list",
    "set_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
}


def read_as(kind: type[T], value: Any, place: str = "") -> T:
    """A dataclass from a mapping. Raises: ConfigError, with the place of the first mistake."""
    return _read(TypeAdapter(kind), value, place, kind)


def read_field(hint: Any, value: Any, place: str) -> Any:
    """A value of this type. Raises: ConfigError, with the place."""
    config = ConfigDict(strict=True, arbitrary_types_allowed=True)
    found = _read(TypeAdapter(hint, config=config), value, place, hint)
    # Where a number is wanted a whole one will do, and is written down as it was given.
    return value if type(value) is int and found == value else found


def type_name(hint: Any) -> str:
    """A type as it is written in code."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _read(adapter: TypeAdapter[T], value: Any, place: str, hint: Any) -> T:
    try:
        # As JSON, for there strict means "no number from a text", and not "no set from a list" too.
        return adapter.validate_json(json.dumps(value))
    except ValidationError as error:
        raise ConfigError(_sentence(error, value, place, hint)) from error


def _sentence(error: ValidationError, value: Any, place: str, hint: Any) -> str:
    # Of a union each member complains; who came furthest is the one that was meant.
    mistakes = error.errors()
    worst = max(mistakes, key=lambda e: (e["type"] in _UNKNOWN, len(e["loc"])))
    path = _path(worst["loc"], value)
    where = ".".join(filter(None, [place, *map(str, path)])) or "the recipe"
    found, kind, context = worst["input"], worst["type"], dict(worst.get("ctx", {}))
    if kind in _UNKNOWN:
        known = _fields_at(hint, path[:-1])
        near = did_you_mean(str(path[-1]), known) or (f"; there are {', '.join(known)}" if known else "; leave it out")
        return f"unknown key {where}{near}"
    if kind == "missing":
        return f"{where} is missing; give it"
    if kind == "value_error":
        return f"{where}: {context['error']}" if path or place else str(context["error"])
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"{where} takes {', '.join(choices)}, found {_shown(found)}{did_you_mean(str(found), choices)}"
    return f"{where} takes {_wanted(mistakes, worst)}, found {_shown(found)}"


def _wanted(mistakes: Sequence[Any], worst: Any) -> str:
    place = worst["loc"]
    alike = [e for e in mistakes if len(e["loc"]) == len(place) and e["loc"][:-1] == place[:-1]]
    wanted = [_WANTED.get(e["type"]) or e["msg"].removeprefix("Input should be ") for e in alike]
    return " or ".join(dict.fromkeys(wanted))


def _path(loc: Sequence[str | int], value: Any) -> list[str | int]:
    """The keys and numbers in a place, without the names that pydantic gives to the members of a union."""
    path: list[str | int] = []
    for number, part in enumerate(loc):
        is_last = number == len(loc) - 1
        if isinstance(value, dict) and (part in value or is_last):
            value = value.get(str(part))
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        path.append(part)
    return path


def _fields_at(hint: Any, path: Sequence[str | int]) -> list[str]:
    """The fields of the dataclasses that a type has at this place."""
    import dataclasses

    if path and isinstance(path[0], int):
        return [name for inner in typing.get_args(hint) or [hint] for name in _fields_at(inner, path[1:])]
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        names = [field.name for field in dataclasses.fields(hint)]
        return _fields_at(hints[str(path[0])], path[1:]) if path else names
    return [name for inner in typing.get_args(hint) for name in _fields_at(inner, path)]


def _shown(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[:limit] + "..."
