"""What a row of data is once its format is known: conversations, pairs, texts, preferences, prompts."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from slimtune.data.chat_template import Message
from slimtune.errors import DataError
from slimtune.storage.text_files import parse_json

Text = str | tuple[str, str]
"""One text, or two that are judged together."""


class Turn(BaseModel):
    """One message of a conversation; what else it carries (tool calls, a name, reasoning) goes to the template.

    Attributes:
        weight: 0 for an assistant turn that is shown and not learned, as in OpenAI's format.
    """

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    weight: Literal[0, 1] = Field(1, exclude=True)

    @field_validator("role", mode="before")
    @classmethod
    def _as_templates_call_it(cls, value: Any) -> Any:
        return "system" if value == "developer" else value

    @field_validator("content", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        if value is None:
            return ""
        if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            parts = [part.get("text") for part in value]
            return "".join(parts) if all(isinstance(part, str) for part in parts) else value
        return value

    @model_validator(mode="before")
    @classmethod
    def _says_something(cls, value: Any) -> Any:
        is_silent = isinstance(value, dict) and value.get("content") is None
        if is_silent and not any(value[name] for name in value.keys() - {"role", "content", "weight", "name"}):
            raise ValueError("a turn needs content, or calls of tools")
        return value

    @field_validator("weight", mode="before")
    @classmethod
    def _one_if_unsaid(cls, value: Any) -> Any:
        return 1 if value is None else value

    def message(self) -> Message:
        """The turn as templates want it: arguments of tool calls as objects, nothing that is not set."""
        said = self.model_dump(exclude_none=True)
        if said.get("tool_calls"):
            said["tool_calls"] = [_with_object(call) for call in said["tool_calls"]]
        return said


class Conversation(BaseModel):
    """Messages, and the tools that may be called; every assistant turn is learned but those of weight 0."""

    messages: list[Turn] = Field(min_length=1)
    tools: list[Any] | None = None

    @field_validator("tools", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return (parse_json(value) if isinstance(value, str) and value.strip() else value) or None

    def turns(self) -> list[Message]:
        """The messages as templates want them."""
        return [turn.message() for turn in self.messages]

    def learned(self) -> list[bool]:
        """Which turns are learned."""
        return [turn.role == "assistant" and turn.weight == 1 for turn in self.messages]


class Pair(BaseModel):
    """A prompt and its completion, which is learned."""

    prompt: str
    completion: str

    def turns(self) -> list[Message]:
        """The pair as a user's turn and the assistant's answer."""
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion}]

    def plain(self) -> tuple[str, str]:
        """Prompt and completion as they follow one another where there is no template."""
        return self.prompt, self.completion


class Instruction(Pair):
    """A pair whose prompt is worded for models without a chat template, and which may have a system message."""

    plain_prompt: str
    system: str = ""

    def turns(self) -> list[Message]:
        """The pair as turns, behind the system message if there is one."""
        opening = [{"role": "system", "content": self.system}] if self.system else []
        return [*opening, *super().turns()]

    def plain(self) -> tuple[str, str]:
        """The worded prompt and the completion."""
        return self.plain_prompt, self.completion


class Document(BaseModel):
    """A text to go on with: all of it is learned."""

    text: str = Field(min_length=1)


Row = Conversation | Pair | Document
"""What a model that writes text learns from."""


class Unlabelled(BaseModel):
    """A row with `text`, and a second one if two are judged together."""

    text: str
    text_pair: str | None = None

    @field_validator("text_pair")
    @classmethod
    def _empty_is_none(cls, value: str | None) -> str | None:
        return value or None

    @property
    def texts(self) -> Text:
        """The text, or both."""
        return self.text if self.text_pair is None else (self.text, self.text_pair)


class Labelled(Unlabelled):
    """A row with `text` and `label`; a label is a name, whatever it is written as."""

    label: str

    @field_validator("label", mode="before")
    @classmethod
    def _as_name(cls, value: Any) -> Any:
        return str(value) if isinstance(value, bool | int) else value


class Words(BaseModel):
    """A row with the words of a text."""

    tokens: list[str] = Field(min_length=1)


class Tagged(Words):
    """Words and the tag of each, whatever it is written as."""

    tags: list[str]

    @field_validator("tags", mode="before")
    @classmethod
    def _as_names(cls, value: Any) -> Any:
        return [str(tag) if isinstance(tag, int) else tag for tag in value] if isinstance(value, list) else value


class Preference(BaseModel):
    """Two answers to a prompt, one of them better; all three are texts, or all three lists of messages."""

    prompt: str | list[Turn]
    chosen: str | list[Turn]
    rejected: str | list[Turn]


class Judged(BaseModel):
    """An answer to a prompt, and whether it is a good one; both are texts, or both lists of messages."""

    prompt: str | list[Turn]
    completion: str | list[Turn]
    label: bool


class Prompt(BaseModel):
    """A prompt alone, to be answered; what else the row has is there for a reward to look at."""

    model_config = ConfigDict(extra="allow")

    prompt: str | list[Turn]

    def turns(self) -> list[Message]:
        """The prompt as messages."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return [turn.message() for turn in self.prompt]


M = TypeVar("M", bound=BaseModel)


def checked(model: type[M], value: dict[str, Any], where: str) -> M:
    """A row of this kind; raises DataError with the field at fault."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        raise DataError(f"{where}: {name}: {said[0].lower()}{said[1:]}; correct the row") from error


def _with_object(call: Any) -> Any:
    """A tool call whose arguments are an object: as text they would be quoted twice by the template."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(function.get("arguments"), str):
        return call
    try:
        function = function | {"arguments": parse_json(function["arguments"])}
    except ValueError as error:
        raise DataError(f"the arguments of the call of {function.get('name')} are not JSON ({error})") from error
    return call | {"function": function} if "function" in call else function
