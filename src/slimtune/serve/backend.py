"""What the gateway asks for tokens: an engine in this process, an encoder, or other servers."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from slimtune.engine.request import EngineStats, LoadedAdapter
from slimtune.serve.openai import ChatCompletionRequest, CompletionRequest, bad_request
from slimtune.serve.queue import Turns

GenerationRequest = ChatCompletionRequest | CompletionRequest


@dataclass(frozen=True)
class TokenLogprob:
    """A token's text and log probability, with those of the most likely ones in its place."""

    token: str
    logprob: float
    alternatives: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one of the answers gains at a time.

    Attributes:
        choice: the number of the answer.
        tokens: how many of the tokens it holds.
        prompt_tokens: of the whole request, told once.
        tool_calls: as OpenAI's deltas hold them.
        finish_reason: on an answer's last piece.
    """

    choice: int = 0
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[dict[str, Any], ...] = ()
    finish_reason: str | None = None


class Backend(Protocol):
    """Where answers come from.

    Attributes:
        slots: how many answers it works on at once.
        takes_turns: whether each answer of a request takes a turn of its own; else all of them begin together.
    """

    slots: int
    takes_turns: bool

    async def start(self) -> None:
        """Get ready to answer."""
        ...

    async def stop(self) -> None:
        """End what still runs."""
        ...

    async def is_ready(self) -> bool:
        """Whether it can answer now."""
        ...

    def answer(
        self, body: GenerationRequest, adapter: str | None, tenant: str, turns: Turns
    ) -> AsyncGenerator[Piece, None]:
        """The answers, piece by piece; closing the iterator ends them. Raises: ApiError."""
        ...

    async def embed(self, texts: list[str]) -> tuple[list[list[float]], int]:
        """A vector for each text, and how many tokens they have. Raises: ApiError."""
        ...

    async def load_adapter(self, name: str, folder: Path) -> LoadedAdapter:
        """Make an adapter known by this name. Raises: SlimtuneError."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter that no request uses."""
        ...

    def stats(self) -> EngineStats | None:
        """Where it stands; None where it doesn't tell."""
        ...


async def no_embeddings() -> tuple[list[list[float]], int]:
    """Raises: ApiError, for a base that writes text."""
    raise bad_request("this base writes text; embeddings need an encoder, such as minilm-l6-v2", "model")
