"""What an engine is asked and what it answers; the gateway in front of it knows no more of it than this."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from slimtune.errors import ConfigError, check_number, check_whole

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""Why an answer ends: an end-of-turn token or a stop string; its tokens or the context are used up; or a failure."""


MOST_TEMPERATURE = 100
PENALTY_BOUNDS = {
    "presence_penalty": (-100, 100, 0),
    "frequency_penalty": (-100, 100, 0),
    "repetition_penalty": (0.01, 100, 1),
}
"""The least and the most of each penalty, and its value that changes nothing: beyond, tokens are forced or forbidden,
and logits leave the range of their numbers."""


class TokenConstraint(Protocol):
    """What an answer must match, such as a JSON schema, followed token by token."""

    def mask(self) -> Tensor:
        """(vocabulary,) of booleans: the tokens that may come next."""
        ...

    def accept(self, token_id: int) -> None:
        """Go on behind this token."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one answer are chosen.

    Attributes:
        max_tokens: the most tokens of the answer.
        temperature: what logits are divided by; 0 takes the most likely token.
        top_p: draw among the fewest most likely tokens whose probabilities sum to it.
        top_k: draw among so many most likely tokens; 0 among all.
        min_p: leave out tokens less likely than this share of the most likely one's probability.
        presence_penalty: taken off the logit of each token that the answer has already.
        frequency_penalty: the same, times how often the answer has it.
        repetition_penalty: divides the logit, if it is positive, of each token that prompt or answer have already, and
            multiplies it otherwise.
        seed: makes a draw repeatable, whatever runs beside it.
        stop: texts at which the answer is over; they are not part of it.
        logprobs: of the most likely tokens at each step, how many are reported; 0 is the chosen token's alone.
        ignore_eos: go on behind an end-of-turn token.
        constraint: what the answer must match.

    Raises:
        ConfigError: a value out of range.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    constraint: TokenConstraint | None = None

    def __post_init__(self) -> None:
        # Checked here and not only by the server: a bad value found in the step of a batch would end every answer in
        # it.
        check_whole("max_tokens", self.max_tokens)
        check_whole("top_k", self.top_k, least=0)
        for name in ("temperature", "top_p", "min_p", *PENALTY_BOUNDS):
            check_number(name, getattr(self, name))
        if self.logprobs is not None:
            check_whole("logprobs", self.logprobs, least=0)
        if not 0 <= self.temperature <= MOST_TEMPERATURE:
            raise ConfigError(
                f"temperature must lie in [0, {MOST_TEMPERATURE}], found {self.temperature}; 0 is greedy decoding"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], found {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must lie in [0, 1], found {self.min_p}")
        for name, (least, most, none) in PENALTY_BOUNDS.items():
            if not least <= (value := getattr(self, name)) <= most:
                raise ConfigError(f"{name} must lie in [{least}, {most}], found {value}; {none} is none")
        if any(not text for text in self.stop):
            raise ConfigError("stop holds an empty text, at which every answer would be over; leave it out")


@dataclass(frozen=True)
class Request:
    """A prompt to be answered.

    Attributes:
        prompt: token ids.
        adapter: the loaded adapter to answer with; None is the base.
        tenant: for whom; prompts share what is computed of them only within one tenant.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapter: str | None = None
    tenant: str = ""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError("a prompt must have one token at least")


@dataclass(frozen=True)
class TokenEvent:
    """One more token of an answer.

    Attributes:
        token: its id; -1 where an answer ends without one more, as when it is cancelled.
        text: what it adds to the text; empty while a character or a stop string may be incomplete.
        logprob: of the token before temperature and filters, where the request asks for it.
        alternatives: (token, log probability) of the most likely ones.
        finish_reason: on the last event alone.
        error: what went wrong, where the reason is "error".
    """

    token: int
    text: str
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[float | None, ...]
    prompt_tokens: int


class Handle:
    """A submitted request, for whoever wants to end it early."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End the answer; its slot is free within one step, and a last event says "cancelled"."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter that requests can name.

    Attributes:
        method: its `peft_type`.
        rank: the largest of its sites', where its method has one.
        bytes: the memory that it holds.
    """

    name: str
    method: str
    rank: int | None
    bytes: int


@dataclass(frozen=True)
class EngineStats:
    """Where an engine stands; the counters run from its start on."""

    waiting: int
    running: int
    free_slots: int
    tokens_generated: int
    prompt_tokens: int
    steps: int
    adapter_bytes: int
