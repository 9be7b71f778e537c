"""OpenAI's API as it is taken here: the bodies of requests, in which an unknown field is refused, and errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slimtune.engine.request import PENALTY_BOUNDS
from slimtune.errors import did_you_mean

MAX_CHOICES = 128
"""The most answers of one request, over all its prompts."""
MAX_STOPS = 16
MAX_ALTERNATIVES = 20
_LEAST_PENALTY, _MOST_PENALTY, _ = PENALTY_BOUNDS["repetition_penalty"]


class ApiError(Exception):
    """What a client is told instead of an answer.

    Attributes:
        status: of HTTP.
        kind: what OpenAI calls the type, such as "invalid_request_error".
        code: a word for programs, such as "model_not_found".
        param: the field that is to blame.
        retry_after: seconds, where another try may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.kind = status, message, code, param, kind
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A mistake in the request."""
    return ApiError(400, message, code, param)


def not_found(model: str, visible: Sequence[str]) -> ApiError:
    """There is no such model for this key: the same words, whether it is another tenant's or nobody's."""
    near = did_you_mean(model, visible)
    # Cut: the name is the client's own text, of any length.
    return ApiError(404, f"the model '{model[:100]}' does not exist{near}", "model_not_found", "model")


def unavailable(message: str, retry_after: float = 1.0, code: str = "overloaded") -> ApiError:
    """The server can't answer now."""
    return ApiError(503, message, code, kind="server_error", retry_after=retry_after)


class _Body(BaseModel):
    # Not a number and infinity are no JSON, though Python's parser takes them.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=False)

    idle: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields of OpenAI's that are taken with null or these values alone, which ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _without_what_says_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        # Clients send null for what their user has left open, as OpenAI allows it.
        fields = {field.alias or name for name, field in cls.model_fields.items()} | cls.idle.keys()
        said = {name: value for name, value in data.items() if value is not None or name not in fields}
        return {name: value for name, value in said.items() if value not in cls.idle.get(name, ())}


class _Root(_Body):
    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        try:
            # Something else than an object is refused behind this.
            json.dumps(data if isinstance(data, dict) else {}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("the body holds half of a surrogate pair, such as \\ud800, which is no text") from None
        return data


class StreamOptions(_Body):
    """What a stream holds besides the answer."""

    include_usage: bool = False


class TextPart(_Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class FunctionCall(_Body):
    """The name of a function and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(_Body):
    """A call that the assistant made in an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Body):
    """A turn of the conversation."""

    # What the clients' own libraries send back of an answer that they were given.
    idle: ClassVar[Mapping[str, tuple[Any, ...]]] = {"annotations": ([],), "audio": (), "function_call": ()}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    refusal: str | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.refusal is not None and self.role != "assistant":
            raise ValueError("refusal is only for an assistant's turn")
        is_answer = self.role == "assistant" and (self.tool_calls or self.refusal is not None)
        if self.content is None and not is_answer:
            raise ValueError("content is missing; only an assistant's turn with tool_calls or a refusal goes without")
        return self

    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or self.refusal or ""


class FunctionDefinition(_Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool | None = None


class Tool(_Body):
    """Something that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(_Body):
    """The name of a function."""

    name: str


class NamedTool(_Body):
    """The function that must be called."""

    type: Literal["function"]
    function: NamedFunction


class NamedSchema(_Body):
    """A JSON schema that the answer has to match."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(_Body):
    """Any text."""

    type: Literal["text"]


class JsonFormat(_Body):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(_Body):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class Generation(_Root):
    """What chats and completions have in common; `top_k` and what follows are vLLM's additions to OpenAI's fields."""

    idle: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "logit_bias": ({},), "metadata": ({},), "store": (False,), "service_tier": ("auto", "default"),
        "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": (), "verbosity": (),
        "web_search_options": (), "functions": ([],), "function_call": (), "safety_identifier": (),
        "prompt_cache_key": (),
    }  # fmt: skip

    model: Annotated[str, Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    # Within what torch's manual_seed takes; beyond, it would raise in the thread of the engine.
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    user: str | None = None
    # vLLM writes "all" as -1, others as 0.
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=_LEAST_PENALTY, le=_MOST_PENALTY)] = 1.0
    ignore_eos: bool = False
    # What is kept of a prompt is reused under the same salt only, and always within one tenant.
    cache_salt: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Generation:
        # As OpenAI's server answers it; ignored, a client would wait for a usage that never comes.
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream=true")
        if any(not text for text in self.stops()):
            raise ValueError("stop holds an empty text, at which every answer would be over; leave it out")
        return self

    def owner(self, tenant: str) -> str:
        """For whom what is kept of a prompt may be used again; another text for another tenant or salt."""
        # By length, so that no name and salt together read as those of another tenant.
        return f"{len(tenant)} {tenant} {self.cache_salt or ''}"

    def stops(self) -> tuple[str, ...]:
        """The texts at which an answer is over."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatCompletionRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _chat_fits_together(self) -> ChatCompletionRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same; pass one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool):
            wanted, known = self.tool_choice.function.name, [tool.function.name for tool in self.tools or ()]
            if wanted not in known:
                raise ValueError(f"tool_choice names '{wanted}', which is none of the tools")
        # Two grammars at once can contradict each other; a call has the schema of its tool already.
        if self.must_call() and self.response_format not in (None, TextFormat(type="text")):
            raise ValueError("a call is required by tool_choice, so response_format has nothing to say; leave it out")
        return self

    def must_call(self) -> bool:
        """Whether the answer has to be the call of a tool."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    def usable_tools(self) -> list[Tool]:
        """The tools that the model is shown."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools or () if tool.function.name == self.tool_choice.function.name]
        return [] if self.tool_choice == "none" else list(self.tools or ())

    def most_tokens(self) -> int | None:
        """The bound on the answer's length; None is the rest of the context."""
        # Both names are in use: OpenAI renamed the field, and most clients still send the older one.
        return self.max_completion_tokens or self.max_tokens

    def alternatives(self) -> int | None:
        """How many alternatives of each token are reported; None for no log probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def choices(self) -> int:
        """How many answers there are."""
        return self.n


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    idle: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **Generation.idle, "echo": (False,), "best_of": (1,), "suffix": ("",)
    }  # fmt: skip

    prompt: str | list[str] | list[Annotated[int, Field(ge=0)]] | list[list[Annotated[int, Field(ge=0)]]]
    # OpenAI's default for completions, surprising as it is; chats have none.
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _is_not_too_much(self) -> CompletionRequest:
        if any(not prompt for prompt in self.prompts()) or not self.prompts():
            raise ValueError("prompt is empty; pass a text or token ids")
        if self.choices() > MAX_CHOICES:
            raise ValueError(f"{self.choices()} answers were asked for, and {MAX_CHOICES} are the most of one request")
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(item, int) for item in self.prompt):
            return [list(self.prompt)] if self.prompt else []  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[return-value]

    def most_tokens(self) -> int | None:
        """The bound on the answer's length; None is the rest of the context."""
        return self.max_tokens

    def alternatives(self) -> int | None:
        """How many alternatives of each token are reported; None for no log probabilities at all."""
        return self.logprobs

    def choices(self) -> int:
        """How many answers there are."""
        return self.n * len(self.prompts())


class EmbeddingRequest(_Root):
    """`POST /v1/embeddings`."""

    model: Annotated[str, Field(min_length=1)]
    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_no_tokens(cls, data: Any) -> Any:
        given = data.get("input") if isinstance(data, dict) else None
        if isinstance(given, list) and given and isinstance(given[0], int | list):
            # They would be read as this model's, and mean something else.
            raise ValueError(
                "input holds token ids, which are those of another model's tokenizer; pass texts (in LangChain, "
                "check_embedding_ctx_length=False)"
            )
        return data

    def texts(self) -> list[str]:
        """The texts."""
        return [self.input] if isinstance(self.input, str) else self.input


class LoadAdapterRequest(_Root):
    """`POST /v1/load_lora_adapter`, as vLLM has it; the path lies under the folder of `--adapters`."""

    lora_name: str
    lora_path: str


class UnloadAdapterRequest(_Root):
    """`POST /v1/unload_lora_adapter`; `force` cancels requests that run on the adapter instead of waiting for them."""

    lora_name: str
    force: bool = False


def from_validation(errors: Sequence[Any], fields: Sequence[str]) -> ApiError:
    """The most telling of pydantic's findings as an error for the client.

    Args:
        fields: those that the body may have, for the nearest name.
    """
    # A misspelt name first, for it also leaves its field missing; then the branch of a union that went furthest.
    finding = min(errors, key=lambda error: (error["type"] != "extra_forbidden", -len(error["loc"])))
    # Branches of unions stand in the place as names of types, which say nothing to a client.
    last = finding["loc"][-1]
    place = [str(part) for part in finding["loc"] if isinstance(part, int) or part in _FIELDS]
    if finding["type"] == "extra_forbidden":
        return bad_request(f"unknown field '{last[:100]}'{did_you_mean(last, fields)}", str(last), "unknown_field")
    if finding["type"] == "json_invalid":
        return bad_request("the body is not JSON", code="invalid_json")
    if finding["loc"] == ("body",) and finding["type"] != "value_error":
        return bad_request(
            "the body must be a JSON object, sent with Content-Type: application/json", None, "invalid_json"
        )
    param = ".".join(place)
    message = str(finding["msg"]).removeprefix("Value error, ")
    return bad_request(f"{param}: {message}" if param else message, param or None)


_FIELDS = {
    field.alias or name
    for body in (*_Body.__subclasses__(), *_Root.__subclasses__(), *Generation.__subclasses__())
    for name, field in body.model_fields.items()
}
