"""Whether the values of a config are of the types that its fields are annotated with.

A config may come from a file that anybody wrote. What a method asks of its numbers and names it checks itself;
this is the check of all fields of all methods, so that no code further on meets a list where it expects a name.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from slimtune.errors import ConfigError

MOST = 1e300
"""A whole number beyond this can't be made a fraction; JSON has numbers of any length."""


def check_types(config: Any) -> None:
    """See that each field of a dataclass holds what its annotation says. Raises: ConfigError, with the field's name."""
    hints = _hints(type(config))
    for field in dataclasses.fields(config):
        # With a default: a check of the method's own may have failed before the field was set.
        value = getattr(config, field.name, field.default)
        # Defaults pass unseen: `None` for "not set" is the default of fields whose annotation doesn't name it.
        if value is not field.default and not fits(value, hints[field.name]):
            shown = repr(value)
            shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
            raise ConfigError(f"{field.name} must be {_words(hints[field.name])}, found {shown}; correct it")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type: whole numbers are fractions too, and any sequence or set is a list.

    A form of annotation that isn't known here fits everything.
    """
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin in (list, set, tuple):
        # A text is a sequence of its letters to Python, and never meant as one here.
        is_list = isinstance(value, Sequence | Set) and not isinstance(value, str | bytes)
        return is_list and all(fits(item, one) for one in inner[:1] for item in value)
    if origin is dict:
        # `peft` has None for an empty one.
        return value is None or (
            isinstance(value, Mapping)
            and (not inner or all(fits(key, inner[0]) and fits(item, inner[1]) for key, item in value.items()))
        )
    if origin in (int, float):
        # numpy's numbers are Integral and Real, too; True is an int to Python.
        is_number = isinstance(value, Integral if origin is int else Real) and not isinstance(value, bool)
        return is_number and (not isinstance(value, Integral) or abs(int(value)) < MOST)
    return origin is Any or not isinstance(origin, type) or isinstance(value, origin)


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", types.NoneType: "None"}


def _words(hint: Any) -> str:
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(one) for one in inner))
    if origin in (list, set, tuple):
        return f"a list of {_words(inner[0])}".replace("of a ", "of ") if inner else "a list"
    if origin is dict:
        return f"a mapping of names to {_words(inner[1])}" if inner and inner[1] is not Any else "a mapping"
    return _NAMES.get(origin, getattr(origin, "__name__", str(origin)))
