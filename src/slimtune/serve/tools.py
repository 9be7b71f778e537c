"""Calls of tools: shown to the model by its chat template, and read out of what it writes."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from slimtune.serve.openai import Message, Tool

_OPEN = "<tool_call>"
_WRAPPED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)


def knows_tools(tokenizer: Any) -> bool:
    """Whether the chat template shows tools to the model."""
    return "tools" in str(getattr(tokenizer, "chat_template", "") or "")


def for_template(message: Message) -> dict[str, Any]:
    """A turn as chat templates read it: arguments as objects, where OpenAI has them as text."""
    turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    turn["content"] = message.text()
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "type": "function",
                "function": {"name": call.function.name, "arguments": _object_or_text(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return turn


def _object_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def call_schema(tools: Sequence[Tool]) -> Mapping[str, Any]:
    """What the call of one of the tools has to match."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


class ToolReader:
    """Parts an answer, as it comes, into what is said and the tools that are called.

    Models write `<tool_call>{"name": ..., "arguments": ...}</tool_call>` (Hermes, Qwen, SmolLM3), or nothing but the
    JSON (Llama 3, with "parameters"). What looks like a call and is none is part of the text.

    Args:
        is_call: the whole answer has to be a call.
        only_one: further calls are left out, as parallel_tool_calls=false wants it.
    """

    def __init__(self, tools: Sequence[Tool], is_call: bool = False, only_one: bool = False) -> None:
        self._names = {tool.function.name for tool in tools}
        self._only_one = only_one
        self._held, self._is_call, self._has_said = "", is_call, False

    def feed(self, text: str) -> str:
        """What is surely part of the text now."""
        self._held += text
        if self._is_call:
            return ""
        start = self._held.find(_OPEN)
        # Only at the very start: JSON in the middle of an answer is an example that is being explained.
        if not self._has_said and self._held.lstrip()[:1] in ("{", "["):
            start = 0
        if start < 0:
            # "<tool" may still become the mark; streamed, it couldn't be taken back.
            start = len(self._held) - _overlap(self._held, _OPEN)
            # White space in front of a call isn't said, so that a call's message has no content, as OpenAI's have none.
            if not self._has_said and not self._held.strip():
                start = 0
        else:
            self._is_call = True
        said, self._held = self._held[:start], self._held[start:]
        self._has_said = self._has_said or bool(said.strip())
        return said

    def finish(self) -> tuple[str, tuple[dict[str, Any], ...]]:
        """The rest of the text and the calls; without any calls, all that was held back is text."""
        wrapped = _WRAPPED.findall(self._held)
        values = [value for text in wrapped or [self._held] for value in _values(text)]
        calls = [call for value in values if (call := self._call(value))]
        # All or none: a call beside something unreadable would lose what the model meant by that.
        if not self._is_call or not calls or len(calls) < len(values):
            return self._held, ()
        if self._only_one:
            calls = calls[:1]
        return "", tuple({"index": index, **call} for index, call in enumerate(calls))

    def _call(self, value: Any) -> dict[str, Any] | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters"))
        if not isinstance(arguments, dict):
            return None
        # As text, as the API has it; the client parses it again.
        function = {"name": value["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _values(text: str) -> list[Any]:
    """The JSON values of a text, parted by white space, `;` or `,`; one of None where there is anything else."""
    decoder, values, place = json.JSONDecoder(), [], 0
    while place < len(text):
        if text[place] in " \t\r\n;,":
            place += 1
            continue
        try:
            # `json.loads` refuses anything behind the first value, and Llama writes several calls with semicolons
            # between them.
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return [None]
        values += value if isinstance(value, list) else [value]
    return values


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of the text may be the start of the mark."""
    return next((size for size in range(min(len(text), len(mark)), 0, -1) if text.endswith(mark[:size])), 0)
