"""Answers by a JSON schema: what matches can be written to its end; a schema that nothing matches is refused first."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from slimtune.errors import ConfigError
from slimtune.serve.grammar import Grammars, JsonConstraint
from slimtune.serve.schema import MOST_LEVELS
from small_text_model import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ENDS = [TOKENIZER.eos_token_id]
GRAMMARS = Grammars(TOKENIZER, len(TOKENIZER), ENDS)
NULL = {"type": "null"}
ITSELF = {"$ref": "#/$defs/itself"}


def object_of(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    required = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def with_definitions(schema: dict[str, Any], **definitions: Any) -> dict[str, Any]:
    return schema | {"$defs": {"itself": ITSELF} | definitions}


def is_taken(constraint: JsonConstraint, text: str) -> bool:
    """Whether the tokens of the text are allowed one after the other, and the end behind them."""
    # One letter at a time: a text can be cut into tokens in several ways, and a forced one is cut in one of them.
    for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
        if not constraint.mask()[token]:
            return False
        constraint.accept(token)
    return bool(constraint.mask()[ENDS[0]])


NO_MATCH: dict[str, Any] = {
    "itself": {"$ref": "#"},
    "each other": with_definitions({"$ref": "#/$defs/a"}, a={"$ref": "#/$defs/b"}, b={"$ref": "#/$defs/a"}),
    "by its id": {"$id": "http://example.org/s", "$ref": "http://example.org/s"},
    "in a property": object_of(a={"$ref": "#"}),
    "in the second property": with_definitions(object_of(x=NULL, a=ITSELF)),
    "in a property of a property": object_of(a=object_of(b={"$ref": "#/properties/a"})),
    "in any property": {"type": "object", "additionalProperties": {"$ref": "#"}, "minProperties": 1},
    "in a property without a schema": {"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["a"]},
    "in an array": {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    "in the first of an array": {"type": "array", "prefixItems": [{"$ref": "#"}, NULL], "minItems": 1},
    "in one of all": with_definitions({"allOf": [ITSELF, NULL]}),
    "in each of some": object_of(a={"anyOf": [{"$ref": "#"}, {"oneOf": [object_of(b={"$ref": "#"}), False]}]}),
    "with an escaped name": {"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {"$ref": "#"}}},
    "false": False,
    "a false property": object_of(a=False),
    "no choice": {"enum": []},
    "bounds": {"type": "integer", "minimum": 5, "maximum": 3},
}  # fmt: skip


@pytest.mark.parametrize("case", NO_MATCH)
def test_a_schema_that_no_json_matches_is_refused(case: str) -> None:
    with pytest.raises(ConfigError, match=r"matches no JSON|can't be followed") as caught:
        GRAMMARS.matching(NO_MATCH[case])
    assert "\n" not in str(caught.value)


MATCHED: dict[str, tuple[dict[str, Any], str]] = {
    "a list of nodes": (object_of(next={"anyOf": [{"$ref": "#"}, NULL]}), '{"next":{"next":null}}'),
    "a tree": (object_of(children={"type": "array", "items": {"$ref": "#"}}), '{"children":[{"children":[]}]}'),
    "a property that may be left out": (object_of([], a={"$ref": "#"}), '{"a":{}}'),
    "a way out among others": (with_definitions({"anyOf": [ITSELF, NULL]}), "null"),
    "an optional one that holds itself": (with_definitions(object_of([], a=ITSELF)), "{}"),
    "an array that may be empty": ({"type": "array", "items": {"$ref": "#"}}, "[[],[[]]]"),
    "another type": ({"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "null"),
    "any type": ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "1"),
    "an unused definition": (with_definitions(NULL), "null"),
    "a property called $ref": (object_of(["$ref"], **{"$ref": NULL}), '{"$ref":null}'),
    "an anchor": ({"$ref": "#n", "$defs": {"a": {"$anchor": "n", "type": "null"}}}, "null"),
    "a root within": (
        {"$ref": "#/$defs/a", "$defs": {"a": {"$id": "http://x.org/a", "$ref": "#/$defs/b", "$defs": {"b": NULL}}}},
        "null",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MATCHED)
def test_what_matches_is_taken_to_its_end(case: str) -> None:
    schema, text = MATCHED[case]
    assert is_taken(GRAMMARS.matching(schema), text)


def test_a_dead_end_on_the_way_is_a_failure_and_no_end() -> None:
    """A choice that nothing matches can still be begun: the answer must not stop there as if it were whole."""
    constraint = GRAMMARS.matching(with_definitions(object_of([], a=ITSELF, b=NULL)))
    for token in TOKENIZER('{"a":', add_special_tokens=False)["input_ids"]:
        constraint.accept(token)
    for _ in range(2):
        with pytest.raises(ConfigError, match="can't be followed"):
            constraint.mask()


def test_a_forbidden_token_is_refused() -> None:
    constraint = GRAMMARS.matching(NULL)
    with pytest.raises(ConfigError, match="can't be followed"):
        constraint.accept(TOKENIZER("7", add_special_tokens=False)["input_ids"][0])


VALUES = st.recursive(
    st.sampled_from([NULL, {"type": "integer"}, {"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}, {"$ref": "#/$defs/c"}]),
    lambda inside: st.one_of(
        st.lists(inside, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
        st.tuples(inside, st.integers(0, 2)).map(lambda p: {"type": "array", "items": p[0], "minItems": p[1]}),
        st.tuples(inside, inside, st.sampled_from([[], ["x"], ["x", "y"]])).map(
            lambda p: object_of(p[2], x=p[0], y=p[1])
        ),
    ),
    max_leaves=5,
)


def finite(schema: dict[str, Any], definitions: dict[str, Any], levels: int) -> bool:
    """Whether a value of at most so many levels matches, by the definition."""
    if levels == 0:
        return False
    if "$ref" in schema:
        return finite(definitions[schema["$ref"][-1]], definitions, levels - 1)
    if "anyOf" in schema:
        return any(finite(part, definitions, levels) for part in schema["anyOf"])
    if schema["type"] == "array":
        return schema["minItems"] == 0 or finite(schema["items"], definitions, levels)
    if schema["type"] == "object":
        return all(finite(schema["properties"][name], definitions, levels) for name in schema["required"])
    return True


@given(st.fixed_dictionaries({"a": VALUES, "b": VALUES, "c": VALUES}))
def test_just_the_schemas_without_a_finite_value_are_refused(definitions: dict[str, Any]) -> None:
    schema = {"$ref": "#/$defs/a", "$defs": definitions}
    try:
        GRAMMARS.matching(schema)
        is_refused = False
    except ConfigError as error:
        is_refused = "matches no JSON" in str(error)
    # Behind as many references as there are definitions, one comes again.
    assert is_refused != finite(schema, definitions, len(definitions) + 2)


CHAIN = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from serve.test_grammar import GRAMMARS, chain
try:
    GRAMMARS.matching(chain(int(sys.argv[2])))
except ValueError as error:
    print(error)
"""


def chain(levels: int) -> dict[str, Any]:
    """References one behind the other."""
    links = {f"a{n}": object_of(x={"$ref": f"#/$defs/a{n + 1}"}) for n in range(levels // 2)}
    return {"$ref": "#/$defs/a0", "$defs": links | {f"a{levels // 2}": NULL}}


def test_references_beyond_the_stack_are_refused() -> None:
    """llguidance would end the process, so it is another one than this."""
    for levels, answer in ((MOST_LEVELS - 4, ""), (5 * MOST_LEVELS, "levels deep, and 1,000 are the most; use fewer")):
        command = [sys.executable, "-c", CHAIN, json.dumps(sys.path), str(levels)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0
        assert done.stdout.strip().endswith(answer)
        assert bool(done.stdout) == bool(answer)
