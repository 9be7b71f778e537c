"""Calls of tools through the chat template, in whole answers and in streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from slimtune.serve.openai import Tool
from slimtune.serve.tools import ToolReader
from small_server import Started, started

TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments.size }})"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ORDER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "order",
        "description": "Order a coffee.",
        "parameters": {
            "type": "object",
            "properties": {"size": {"enum": ["small", "large"]}},
            "required": ["size"],
            "additionalProperties": False,
        },
    },
}
CALL = '{"name": "order", "arguments": {"size": "large"}}'


def read(text: str, pieces: int, **options: Any) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """What a reader makes of a text that comes in pieces of so many characters."""
    reader = ToolReader([Tool.model_validate(ORDER)], **options)
    said = [reader.feed(text[start : start + pieces]) for start in range(0, len(text), pieces)]
    rest, calls = reader.finish()
    parsed = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
    return "".join(said) + rest, parsed


@pytest.mark.parametrize("pieces", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", "", 1),
        (f"Sure. <tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "Sure. ", 2),
        (f"<tool_call>{CALL}", "", 1),
        (CALL, "", 1),
        (f"  [{CALL}, {CALL}]", "", 2),
        (CALL.replace("arguments", "parameters"), "", 1),
        (f"{CALL}; {CALL}", "", 2),
    ],
)
def test_calls_are_read_however_they_come(text: str, said: str, calls: int, pieces: int) -> None:
    assert read(text, pieces) == (said, [("order", {"size": "large"})] * calls)


@pytest.mark.parametrize("pieces", [1, 5, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "a < b, and <tool is no call",
        '{"name": "unknown", "arguments": {}}',
        '{"name": "order", "arguments": "large"}',
        "{ not json",
        "<tool_call>nonsense</tool_call> and more",
        f"<tool_call>{CALL}</tool_call><tool_call>nonsense</tool_call>",
        f"I could say {CALL} but don't",
        "",
        "   ",
        "[1, 2]",
    ],
)
def test_what_is_no_call_stays_text_to_the_letter(text: str, pieces: int) -> None:
    assert read(text, pieces) == (text, [])


def test_one_call_where_only_one_is_wanted() -> None:
    assert len(read(f"[{CALL}, {CALL}]", 4, only_one=True)[1]) == 1


@pytest.fixture(scope="module")
def server() -> Iterator[Started]:
    with started(template=TEMPLATE) as running:
        yield running


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "order"}}])
def test_a_call_that_must_come_matches_the_schema(server: Started, choice: Any) -> None:
    options: dict[str, Any] = {"model": "base", "tools": [ORDER], "tool_choice": choice, "max_tokens": 200, "seed": 1}
    turns: list[Any] = [{"role": "user", "content": "a large one"}]
    answer = server.client().chat.completions.create(messages=turns, **options).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    (call,) = answer.message.tool_calls  # type: ignore[misc]
    assert call.function.name == "order"  # type: ignore[union-attr]
    assert json.loads(call.function.arguments)["size"] in ("small", "large")  # type: ignore[union-attr]
    chunks = list(server.client().chat.completions.create(messages=turns, stream=True, **options))
    (delta,) = [c.choices[0].delta for c in chunks if c.choices[0].delta.tool_calls]
    assert delta.tool_calls[0].function.name == "order"  # type: ignore[index, union-attr]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    # What was called and what came of it go back into the template.
    turns += [
        answer.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    assert server.client().chat.completions.create(messages=turns, **options | {"max_tokens": 100}).choices


def test_tools_that_may_be_called_leave_text_alone(server: Started) -> None:
    options: dict[str, Any] = {"model": "base", "temperature": 0, "max_tokens": 20}
    turns: list[Any] = [{"role": "user", "content": "hello"}]
    whole = server.client().chat.completions.create(messages=turns, tools=[ORDER], **options).choices[0].message.content
    stream = server.client().chat.completions.create(messages=turns, tools=[ORDER], stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole
    unseen = server.client().chat.completions.create(messages=turns, tools=[ORDER], tool_choice="none", **options)
    plain = server.client().chat.completions.create(messages=turns, **options)
    assert unseen.choices[0].message.content == plain.choices[0].message.content
