"""Pieces of answers in the form in which OpenAI's clients read them, as a stream or as a whole."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from slimtune.serve.backend import GenerationRequest, Piece, TokenLogprob
from slimtune.serve.openai import ChatCompletionRequest

DONE = b"data: [DONE]\n\n"


@dataclass
class _Choice:
    """One answer, put together from its pieces."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    length: int = 0


class Responses:
    """The responses to one request."""

    def __init__(self, body: GenerationRequest, model: str) -> None:
        self.body, self.model = body, model
        self.is_chat = isinstance(body, ChatCompletionRequest)
        self.id = ("chatcmpl-" if self.is_chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())
        self.choices = [_Choice() for _ in range(body.choices())]
        self.prompt_tokens = self.tokens = 0
        self._has_role = [False] * len(self.choices)

    def whole(self) -> dict[str, Any]:
        """All that was `add`ed."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        choices = [self._whole_choice(index, choice) for index, choice in enumerate(self.choices)]
        return self._head(kind) | {"choices": choices, "usage": self.usage()}

    def add(self, piece: Piece) -> None:
        """Keep a piece for `whole`."""
        self._count(piece)
        choice = self.choices[piece.choice]
        choice.text.append(piece.text)
        choice.logprobs += piece.logprobs
        for call in piece.tool_calls:
            _merge(choice.tool_calls, call)
        choice.finish_reason = piece.finish_reason or choice.finish_reason

    def events(self, pieces: Iterable[Piece]) -> bytes:
        """Server-sent events of these pieces; of those that say nothing, none."""
        lines = []
        for piece in pieces:
            self._count(piece)
            # Pieces without text are common: half a character, or what may begin a stop string.
            if piece.text or piece.logprobs or piece.tool_calls or piece.finish_reason:
                lines.append(_event(self._chunk(piece)))
        return b"".join(lines)

    def last_event(self) -> bytes:
        """What ends a stream."""
        options = self.body.stream_options
        if options is None or not options.include_usage:
            return DONE
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return _event(self._head(kind) | {"choices": [], "usage": self.usage()}) + DONE

    def usage(self) -> dict[str, int]:
        """How many tokens there were."""
        total = self.prompt_tokens + self.tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": total}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _count(self, piece: Piece) -> None:
        self.prompt_tokens += piece.prompt_tokens
        self.tokens += piece.tokens

    def _chunk(self, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": piece.choice, "finish_reason": piece.finish_reason, "logprobs": None}
        if not self.is_chat:
            choice["text"] = piece.text
            choice["logprobs"] = self._legacy_logprobs(piece.logprobs, self.choices[piece.choice])
            return self._head("text_completion") | {"choices": [choice]}
        delta: dict[str, Any] = {}
        if not self._has_role[piece.choice]:
            self._has_role[piece.choice] = True
            delta["role"] = "assistant"
        if piece.text:
            delta["content"] = piece.text
        if piece.tool_calls:
            delta["tool_calls"] = list(piece.tool_calls)
        choice["delta"], choice["logprobs"] = delta, _chat_logprobs(piece.logprobs)
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def _whole_choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        shared = {"index": index, "finish_reason": choice.finish_reason}
        if not self.is_chat:
            return shared | {"text": text, "logprobs": self._legacy_logprobs(choice.logprobs, choice)}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if choice.tool_calls:
            calls = [{name: part for name, part in call.items() if name != "index"} for call in choice.tool_calls]
            message |= {"content": text or None, "tool_calls": calls}
        return shared | {"message": message, "logprobs": _chat_logprobs(choice.logprobs)}

    def _legacy_logprobs(self, logprobs: Iterable[TokenLogprob], choice: _Choice) -> dict[str, Any] | None:
        """Log probabilities in the form of the older completions."""
        logprobs = list(logprobs)
        if not logprobs:
            return None
        offsets = []
        for entry in logprobs:
            offsets.append(choice.length)
            choice.length += len(entry.token)
        return {
            "tokens": [entry.token for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            # Parts of characters can have one text: the likeliest of them stays.
            "top_logprobs": [dict(reversed(entry.alternatives)) for entry in logprobs],
            "text_offset": offsets,
        }


def _merge(calls: list[dict[str, Any]], delta: dict[str, Any]) -> None:
    """Add to the calls what one piece holds of one of them: a new one, or more of its arguments."""
    known = next((call for call in calls if call["index"] == delta.get("index")), None)
    if known is None:
        function = {"name": "", "arguments": ""} | {k: v for k, v in delta.get("function", {}).items() if v is not None}
        calls.append(delta | {"function": function, "type": "function"})
        return
    for name, text in delta.get("function", {}).items():
        known["function"][name] += text or ""


def error_event(body: dict[str, Any]) -> bytes:
    """An error in the middle of a stream, after which nothing comes."""
    return _event(body)


def _event(value: dict[str, Any]) -> bytes:
    # By hand and not by pydantic: this runs for each token, on the cores that also compute it.
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _chat_logprobs(logprobs: Iterable[TokenLogprob]) -> dict[str, Any] | None:
    content = [
        _token(entry.token, entry.logprob) | {"top_logprobs": [_token(*other) for other in entry.alternatives]}
        for entry in logprobs
    ]
    return {"content": content, "refusal": None} if content else None


def _token(text: str, logprob: float) -> dict[str, Any]:
    # A token that is a part of a character has bytes of its own, which its text doesn't tell.
    has_bytes = "\N{REPLACEMENT CHARACTER}" not in text
    # Minus infinity is no JSON; OpenAI writes this number for it.
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode()) if has_bytes else None}
