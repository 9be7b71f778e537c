"""What is told of a JSON schema before llguidance reads it: whether any JSON matches, and how deep its references go.

llguidance finds out itself where bounds, types and patterns contradict each other. Where a value would have to hold
itself, it does not: it allows nothing at all, or begins an answer that has no end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from slimtune.errors import ConfigError

MOST_LEVELS = 1000
"""llguidance follows references on the stack, and ends the process at some 1,600 levels of a thread's 8 MiB."""
_INSIDE = frozenset(
    ("properties", "patternProperties", "additionalProperties", "items", "prefixItems", "anyOf", "oneOf", "allOf")
)
"""The keywords by which one schema holds others."""


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raises: ConfigError, for a schema that no JSON matches, or whose references go too deep."""
    levels = _levels(schema)
    if levels > MOST_LEVELS:
        raise ConfigError(
            f"the JSON schema's references may go {levels:,} levels deep, and {MOST_LEVELS:,} are the most; use fewer"
        )
    if not _has_match(schema):
        raise ConfigError(
            "the JSON schema matches no JSON, for what it requires is false or would have to hold itself; leave a way "
            "out of its references, such as a property that is not required"
        )


def _levels(schema: Mapping[str, Any]) -> int:
    """The most levels that schemas within each other and behind references can have.

    Each reference is followed once on a way down, from the deepest place where it stands at most.
    """
    deepest = 0
    references: dict[str, int] = {}
    pending: list[tuple[Any, int]] = [(schema, 1)]
    while pending:
        value, level = pending.pop()
        deepest = max(deepest, level)
        if isinstance(value, list):
            pending += [(inside, level) for inside in value]
        if not isinstance(value, Mapping):
            continue
        pending += [(inside, level + (key in _INSIDE)) for key, inside in value.items()]
        if isinstance(name := value.get("$ref"), str):
            references[name] = max(level, references.get(name, 0))
    return deepest + sum(references.values())


def _has_match(root: Mapping[str, Any]) -> bool:
    """Whether a value can be finite: the least set of schemas that need nothing but such as are in the set already."""
    waiting: dict[int, list[int]] = defaultdict(list)
    owners: list[int] = []
    left: dict[int, int] = {}
    matched: list[int] = []
    pending: list[Any] = [root]
    # Schemas are told by their address: each is a part of the root, which holds them all.
    while pending:
        schema = pending.pop()
        if id(schema) in left:
            continue
        needs = list(_needs(schema, root))
        left[id(schema)] = len(needs)
        if not needs:
            matched.append(id(schema))
        for choices in needs:
            for choice in choices:
                waiting[id(choice)].append(len(owners))
            owners.append(id(schema))
            pending += choices
    met: set[int] = set()
    while matched:
        for need in waiting[matched.pop()]:
            if need not in met:
                met.add(need)
                left[owners[need]] -= 1
                if not left[owners[need]]:
                    matched.append(owners[need])
    return left[id(root)] == 0


def _needs(schema: Any, root: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Of each list one schema has to have a match, or this one has none; what isn't understood needs nothing."""
    if schema is False:
        yield []
    # References inside of a schema with an id are not the root's.
    if not isinstance(schema, Mapping) or ("$id" in schema and schema is not root):
        return
    if "$ref" in schema:
        yield [_referred(schema["$ref"], root)]
    for keyword in ("anyOf", "oneOf"):
        if isinstance(schema.get(keyword), list):
            yield schema[keyword]
    if isinstance(schema.get("allOf"), list):
        yield from ([part] for part in schema["allOf"])
    # A value of several types, or of any, may be one that holds no others.
    kind = schema.get("type")
    if kind in ("object", ["object"]):
        yield from ([part] for part in _required(schema))
    elif kind in ("array", ["array"]):
        yield from ([part] for part in _first_items(schema))


def _required(schema: Mapping[str, Any]) -> Iterator[Any]:
    """What an object holds in any case."""
    properties, names = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(names, list):
        return
    others = True if "patternProperties" in schema else schema.get("additionalProperties", True)
    for name in names:
        yield properties.get(name, others) if isinstance(name, str) else True
    least = schema.get("minProperties", 0)
    if isinstance(least, int | float) and least > max(len(names), len(properties)):
        yield others


def _first_items(schema: Mapping[str, Any]) -> Iterator[Any]:
    """What an array holds in any case."""
    least, items = schema.get("minItems", 0), schema.get("items", True)
    first, others = schema.get("prefixItems", []), items
    if isinstance(items, list):
        # As it was written before prefixItems.
        first, others = items, schema.get("additionalItems", True)
    if not isinstance(least, int | float) or not isinstance(first, list):
        return
    for place, part in enumerate(first):
        if place < least:
            yield part
    if least > len(first):
        yield others


def _referred(name: Any, root: Mapping[str, Any]) -> Any:
    """The schema that a reference within the root names; True for one that goes elsewhere."""
    if not isinstance(name, str) or not (name == "#" or name.startswith("#/")):
        return True
    found: Any = root
    for part in name.split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return True
    return found
