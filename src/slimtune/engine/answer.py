"""One request on its way to an answer, and what a slot keeps of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from slimtune.adapters.rows import BASE
from slimtune.engine.adapters import ServedAdapter
from slimtune.engine.request import Completion, Handle, Request, TokenEvent
from slimtune.engine.sampling import Sampler
from slimtune.engine.text import TextStream
from slimtune.errors import SlimtuneError

OnEvents = Callable[[Sequence[TokenEvent]], None]


@dataclass(eq=False)
class Answer:
    """A request on its way.

    Attributes:
        tokens: of the prompt and of the answer so far; behind the virtual tokens of its adapter.
        read: for how many positions the slot has keys and values, virtual tokens included.
    """

    handle: Handle
    on_events: OnEvents
    adapter: ServedAdapter | None
    sampler: Sampler
    text: TextStream
    tokens: list[int]
    slot: int = -1
    read: int = 0

    @property
    def request(self) -> Request:
        return self.handle.request

    @property
    def virtual(self) -> int:
        return self.adapter.virtual if self.adapter else 0

    def virtual_token(self, position: int) -> Tensor:
        """The vector (dim,) of a virtual token, whose positions count up to -1."""
        assert self.adapter is not None
        assert self.adapter.embeddings is not None
        # A negative index reads from the end: position -1 is the last virtual token, right before the text.
        return self.adapter.embeddings[position]

    @property
    def pending(self) -> int:
        """How many positions are still to be read before the next token can be chosen."""
        # 1 while decoding: the token that was chosen last, whose keys and values aren't in the slot yet.
        return self.virtual + len(self.tokens) - self.read

    @property
    def written(self) -> int:
        """How many tokens the answer has."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def owner(self) -> tuple[str, str]:
        """Whose keys and values these are: the only ones that may reuse them are of the same tenant and adapter."""
        return self.request.tenant, self.adapter.attached_as if self.adapter else BASE


@dataclass
class Remains:
    """What a free slot still holds of its last sequence."""

    owner: tuple[str, str]
    tokens: list[int]


def completion(request: Request, events: Sequence[TokenEvent]) -> Completion:
    """A whole answer of its events. Raises: SlimtuneError, where it failed."""
    last = events[-1]
    if last.finish_reason == "error":
        raise SlimtuneError(f"an answer failed: {last.error}")
    assert last.finish_reason is not None
    tokens = [event for event in events if event.token >= 0]
    return Completion(
        tokens=tuple(event.token for event in tokens),
        text="".join(event.text for event in events),
        finish_reason=last.finish_reason,
        logprobs=tuple(event.logprob for event in tokens),
        prompt_tokens=len(request.prompt),
    )
