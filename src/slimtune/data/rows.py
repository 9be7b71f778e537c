"""Rows of training data as types: conversations, pairs, texts, preferences, prompts, and how each is validated."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from slimtune.data.chat_template import Message
from slimtune.errors import DataError, did_you_mean, listing
from slimtune.storage.text_files import parse_json

Text = str | tuple[str, str]
"""One text, or two that are classified together."""
ONLY_TEXT = "only text is learned from rows; models of images and sound are trained in Python"


ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response", "tool_response"), "tool"),
}
"""The roles that people write, with those that chat templates know."""
CALLS = ("function_call", "tool_call")
"""Roles of a turn whose content is a call as JSON."""
MARKS = ("weight", "train", "training", "loss")
"""Names of the mark that says whether a turn is learned: OpenAI's, two of Axolotl's and ms-swift's."""
PARTIAL_MARKS = ("train_detail", "training_detail", "mask")
"""Marks on parts of a turn, which has one label for all of its tokens here."""


class Turn(BaseModel):
    """One message of a conversation. Other fields (tool calls, a name, reasoning) are handed to the chat template.

    Attributes:
        weight: 0 for an assistant turn that is part of the context and not learned.
    """

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    # Excluded from what the template is shown: a mark for the training is not part of the conversation.
    weight: Literal[0, 1] = Field(1, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _as_chat_templates_write_it(cls, value: Any) -> Any:
        return _canonical_turn(value) if isinstance(value, dict) else value

    @property
    def is_empty(self) -> bool:
        """Whether the turn says nothing: no content, and no calls or reasoning beside it."""
        return not self.content.strip() and not any(v for name, v in (self.model_extra or {}).items() if name != "name")

    def message(self) -> Message:
        """The turn as a dictionary for the chat template, without fields that are None."""
        return self.model_dump(exclude_none=True)


def _canonical_turn(given: dict[str, Any]) -> dict[str, Any]:
    """The turn with `role`, `content`, `weight` and `tool_calls`, whatever they were called; raises ValueError."""
    # Tables give every row the columns of all rows.
    turn = {name: value for name, value in given.items() if value is not None}
    if "role" not in turn and "from" in turn:
        turn["role"] = turn.pop("from")
    if "content" not in turn and "value" in turn:
        turn["content"] = turn.pop("value")
    if "role" in turn:
        role = str(turn["role"]).lower().replace("-", "_")
        if role not in ROLES:
            near = did_you_mean(role, ROLES)
            raise ValueError(f"a turn is from '{turn['role']}', but its role is one of {listing(ROLES, 20)}{near}")
        turn["role"] = ROLES[role]
        if role in CALLS and isinstance(turn.get("content"), str):
            turn["tool_calls"] = _calls_from_json(turn.pop("content"))
    if isinstance(calls := turn.get("tool_calls"), str):
        turn["tool_calls"] = _calls_from_json(calls)
    if "function_call" in turn:
        turn["tool_calls"] = [{"type": "function", "function": turn.pop("function_call")}]
    if turn.get("tool_calls"):
        turn["tool_calls"] = [_with_object(call) for call in turn["tool_calls"]]
    return _with_text(_with_weight(turn))


def _with_weight(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn with `weight` in place of any mark; raises ValueError for marks that can't be obeyed."""
    if partial := [name for name in PARTIAL_MARKS if turn.get(name)]:
        raise ValueError(f"{partial[0]} marks parts of a turn, and a turn is learned as a whole or not at all")
    marks = {name: turn.pop(name) for name in MARKS if name in turn}
    for name, mark in marks.items():
        if name != "weight" and mark not in (0, 1):
            raise ValueError(f"{name} must be true or false, found {mark!r}")
        # Falsy marks on other turns are common and harmless: those turns aren't learned anyway.
        if name != "weight" and mark and turn.get("role") in ("system", "user", "tool"):
            raise ValueError(f"{name} marks a turn of the {turn['role']} as learned, and only the assistant's are")
    # By truth: `weight: 1` beside `train: true` is one statement made twice.
    if len({bool(mark) for mark in marks.values()}) > 1:
        raise ValueError(f"{' and '.join(marks)} contradict each other")
    for name, mark in marks.items():
        turn["weight"] = mark if name == "weight" else int(mark)
    return turn


def _with_text(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn with its content as one text; raises ValueError for images, and for a turn without content."""
    content = turn.get("content")
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        for part in parts:
            kind = next((word for word in ("image", "video", "audio") if word in str(part.get("type"))), None)
            if kind:
                raise ValueError(f"its content holds {'a' if kind == 'video' else 'an'} {kind}: {ONLY_TEXT}")
        # Parts of a type that isn't known leave the list as it is, which the field's type then refuses by its place.
        texts = [part.get("text") for part in parts if part.get("type") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            turn["content"] = "".join(str(text) for text in texts)
    if content is None and not any(turn[name] for name in turn.keys() - {"role", "weight", "name"}):
        raise ValueError("a turn needs content, or calls of tools")
    return turn


def _calls_from_json(text: str) -> list[dict[str, Any]]:
    """Tool calls from a JSON text with one or several; raises ValueError."""
    try:
        calls = parse_json(text)
    except ValueError as error:
        raise ValueError(f"a call of a tool is not JSON ({error})") from error
    several = calls if isinstance(calls, list) else [calls]
    # ShareGPT rows have the bare {"name", "arguments"}; templates look for it under "function".
    return [call if "function" in call else {"type": "function", "function": call} for call in several]


def _with_object(call: Any) -> Any:
    """A tool call whose arguments are an object: as text they would be quoted twice by the template."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        # OpenAI's API writes arguments as text, chat templates apply `tojson` to them.
        function = function | {"arguments": parse_json(function["arguments"])}
    except ValueError as error:
        raise ValueError(f"the arguments of the call of {function.get('name')} are not JSON ({error})") from error
    return call | {"function": function} if "function" in call else function


class Conversation(BaseModel):
    """Messages, and the tools that may be called. Every assistant turn is learned, except those of weight 0."""

    messages: list[Turn] = Field(min_length=1)
    tools: list[Any] | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        return parse_json(value) if isinstance(value, str) and value.lstrip().startswith("[") else value

    @field_validator("tools", mode="before")
    @classmethod
    def _tools_from_json(cls, value: Any) -> Any:
        return (parse_json(value) if isinstance(value, str) and value.strip() else value) or None

    def turns(self) -> list[Message]:
        """The messages as templates want them."""
        return [turn.message() for turn in self.messages]

    def learned(self) -> list[bool]:
        """Which turns are learned."""
        return [turn.role == "assistant" and turn.weight == 1 for turn in self.messages]


def _said(answer: str) -> str:
    """Raises: ValueError, for an empty answer."""
    if not answer.strip():
        raise ValueError("it is empty, so only its end would be learned")
    return answer


class Pair(BaseModel):
    """A prompt and its completion, which is learned."""

    prompt: str
    completion: str

    @field_validator("completion")
    @classmethod
    def _must_say_something(cls, value: str) -> str:
        return _said(value)

    def turns(self) -> list[Message]:
        """The pair as a user's turn and the assistant's answer."""
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion}]

    def plain(self) -> tuple[str, str]:
        """Prompt and completion as they follow one another where there is no template."""
        return self.prompt, self.completion


class Instruction(Pair):
    """A pair with a second prompt for models without a chat template, and perhaps a system message."""

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
    """A text that is learned as a whole."""

    text: str = Field(min_length=1)


Row = Conversation | Pair | Document
"""What a model that writes text learns from."""


class Unlabelled(BaseModel):
    """A row with `text`, and perhaps a second one to classify with it."""

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
    """A row with `text` and `label`; numbers and booleans become names."""

    label: str

    @field_validator("label", mode="before")
    @classmethod
    def _as_name(cls, value: Any) -> Any:
        # Not floats: 0.5 as a label is a score, and a model of classes would be the wrong one for it.
        return str(value) if isinstance(value, bool | int) else value

    @field_validator("label")
    @classmethod
    def _must_be_named(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("the label is empty")
        return value


class Words(BaseModel):
    """A row with the words of a text."""

    tokens: list[str] = Field(min_length=1)


class Tagged(Words):
    """Words with one tag each; numbers become names."""

    tags: list[str]

    @field_validator("tags", mode="before")
    @classmethod
    def _as_names(cls, value: Any) -> Any:
        # Data sets on the Hub have tags as numbers, with their names in the features, which a JSONL file has lost.
        return [str(tag) if isinstance(tag, int) else tag for tag in value] if isinstance(value, list) else value


def _learned_whole(answer: str | list[Turn]) -> str | list[Turn]:
    """Raises: ValueError, for an empty answer, or one of which a turn is marked as not learned."""
    if isinstance(answer, str):
        return _said(answer)
    if all(turn.is_empty for turn in answer):
        _said("")
    if any(turn.weight == 0 for turn in answer):
        raise ValueError("a turn of an answer is marked as not learned, and answers are compared as a whole")
    return answer


Answer = Annotated[str | list[Turn], AfterValidator(_learned_whole)]
"""An answer to be preferred or judged: a text, or messages."""


class Preference(BaseModel):
    """Two answers to a prompt, one of them better; all three are texts, or all three lists of messages."""

    prompt: str | list[Turn]
    chosen: Answer
    rejected: Answer


class Judged(BaseModel):
    """An answer to a prompt, and whether it is a good one; both are texts, or both lists of messages."""

    prompt: str | list[Turn]
    completion: Answer
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
        # One fault at a time: the branches of a union each complain, and all but the first of that is noise.
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        fault = first["msg"].removeprefix("Value error, ")
        advice = "" if fault.endswith("?") else "; correct the row"
        raise DataError(f"{where}: {name}: {fault[0].lower()}{fault[1:]}{advice}") from error
