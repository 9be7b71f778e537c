"""Values from a file as the type that a field has, without casts; a mistake is said with its place and the nearest."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from slimtune.errors import ConfigError, did_you_mean

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", strict=True)
"""What a dataclass that is read from a file carries as `__pydantic_config__`; those within it take it over."""

LONGEST = 60
"""Characters of a value that an error shows."""
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
    return _read(_adapter_of(kind), value, place, kind)


def read_field(hint: Any, value: Any, place: str) -> Any:
    """A value of this type. Raises: ConfigError, with the place."""
    config = ConfigDict(strict=True, arbitrary_types_allowed=True)
    read = _read(TypeAdapter(hint, config=config), value, place, hint)
    # Where a number is wanted a whole one will do, and is written down as it was given.
    return value if type(value) is int and read == value else read


@cache
def _adapter_of(kind: type[T]) -> TypeAdapter[T]:
    # To make one takes ten times as long as to read with it, and forms read at every key that is pressed.
    return TypeAdapter(kind)


def _read(adapter: TypeAdapter[T], value: Any, place: str, hint: Any) -> T:
    try:
        # As JSON, for there strict means "no number from a text", and not "no set from a list" too.
        return adapter.validate_json(json.dumps(value))
    except ValidationError as error:
        raise ConfigError(_sentence(error.errors(), value, place, hint)) from error


def _sentence(mistakes: Sequence[Any], value: Any, place: str, hint: Any) -> str:
    # Of a union each member complains; the one that came furthest is the one that was meant.
    worst = max(mistakes, key=lambda e: (e["type"] in _UNKNOWN, len(e["loc"])))
    path = _path(worst["loc"], value)
    where = ".".join([place] * bool(place) + path) or "the recipe"
    text = json.dumps(worst["input"], ensure_ascii=False)
    shown = text if len(text) <= LONGEST else text[:LONGEST] + "..."
    match worst["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            known = _fields_at(hint, path[:-1])
            near = did_you_mean(path[-1], known) or (f"; there are {', '.join(known)}" if known else "; leave it out")
            return f"unknown key {where}{near}"
        case "missing":
            return f"{where} is missing; give it"
        case "value_error":
            said = str(worst["ctx"]["error"])
            return f"{where}: {said}" if path or place else said
        case "literal_error":
            choices = worst["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            return f"{where} takes {', '.join(choices)}, found {shown}{did_you_mean(str(worst['input']), choices)}"
    alike = [e for e in mistakes if len(e["loc"]) == len(worst["loc"]) and e["loc"][:-1] == worst["loc"][:-1]]
    wanted = [_WANTED.get(e["type"]) or e["msg"].removeprefix("Input should be ") for e in alike]
    return f"{where} takes {' or '.join(dict.fromkeys(wanted))}, found {shown}"


def _path(loc: Sequence[str | int], value: Any) -> list[str]:
    """The keys and numbers in a place, without the names that pydantic gives to the members of a union."""
    path = []
    for part in loc:
        # pydantic puts names of types between the keys of a place; only what the value really has is a key.
        if isinstance(value, dict) and (part in value or part is loc[-1]):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
        else:
            continue
        path.append(str(part))
    return path


def _fields_at(hint: Any, path: Sequence[str]) -> list[str]:
    """The fields of the dataclasses that a type has at this place."""
    if not dataclasses.is_dataclass(hint):
        return [name for inner in typing.get_args(hint) for name in _fields_at(inner, path)]
    if not path:
        return [field.name for field in dataclasses.fields(hint)]
    return _fields_at(typing.get_type_hints(hint)[path[0]], path[1:])
