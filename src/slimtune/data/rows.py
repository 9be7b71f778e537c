"""Rows of JSONL: conversations, or prompts and completions, with the line in every complaint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from slimtune.errors import DataError, did_you_mean, listing
from slimtune.template import Message


class Turn(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Conversation(BaseModel):
    """A row with `messages`; every assistant turn is learned."""

    messages: list[Turn] = Field(min_length=1)

    def turns(self) -> list[Message]:
        """The messages as templates want them."""
        return [turn.model_dump() for turn in self.messages]


class Pair(BaseModel):
    """A row with `prompt` and `completion`; the completion is learned."""

    prompt: str
    completion: str

    def turns(self) -> list[Message]:
        """The pair as a user's turn and the assistant's answer."""
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion}]


class Prompt(BaseModel):
    """A row with `prompt` alone, to be answered."""

    prompt: str


Row = Conversation | Pair
M = TypeVar("M", bound=BaseModel)


def read_rows(path: Path) -> list[Row]:
    """The rows to learn from; raises DataError with the line at fault."""
    return [_row(value, where) for value, where in objects(path)]


def read_questions(path: Path) -> list[list[Message]]:
    """The conversations to answer, without the answers that they may have; raises DataError."""
    return [_question(value, where) for value, where in objects(path)]


def objects(path: Path) -> list[tuple[dict[str, Any], str]]:
    """The objects of a JSONL file, each with where it stands; raises DataError."""
    # Not splitlines(): a string in JSON may hold separators that only Python takes for the end of a line.
    lines = read_text(path).split("\n")
    found = [_object(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"the data file {path} holds no example; write one JSON object a line")
    return found


def read_text(path: Path) -> str:
    """The whole of a data file; raises DataError."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        problem = f"{error.reason} at byte {error.start}"
        raise DataError(f"{path} is not UTF-8 text ({problem}); pass a JSONL file") from error
    except OSError as error:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        advice = did_you_mean(path.name, siblings) or "; pass a JSONL file"
        raise DataError(f"the data file {path} can't be read: {error.strerror}{advice}") from error


def _object(line: str, where: str) -> tuple[dict[str, Any], str]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); write one JSON object a line") from error
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}, not an object; write one JSON object a line")
    return value, where


def _row(value: dict[str, Any], where: str) -> Row:
    if "messages" in value:
        row = checked(Conversation, value, where)
        if not any(turn.role == "assistant" for turn in row.messages):
            raise DataError(f"{where} has no assistant turn, so nothing would be learned from it; add the answer")
        return row
    if {"prompt", "completion"} <= value.keys():
        return checked(Pair, value, where)
    raise DataError(f"{where} {_fields(value)}, but needs messages, or prompt and completion{_nearest(value)}")


def _question(value: dict[str, Any], where: str) -> list[Message]:
    if "messages" in value:
        turns = checked(Conversation, value, where).turns()
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if not turns:
            raise DataError(f"{where} holds answers only; add the question")
        return turns
    if "prompt" in value:
        return [{"role": "user", "content": checked(Prompt, value, where).prompt}]
    raise DataError(f"{where} {_fields(value)}, but needs messages or prompt{_nearest(value)}")


def checked(model: type[M], value: dict[str, Any], where: str) -> M:
    """A row of this kind; raises DataError with the field at fault."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{where}: {field}: {first['msg'][0].lower()}{first['msg'][1:]}; correct the row") from error


def _fields(value: dict[str, Any]) -> str:
    return f"has the fields {listing(value)}" if value else "has no fields"


def _nearest(value: dict[str, Any]) -> str:
    names = ("messages", "prompt", "completion")
    return next(filter(None, (did_you_mean(key, names) for key in value if key not in names)), "; rename them")
