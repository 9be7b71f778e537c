"""An engine in this process as a backend: prompts are rendered and encoded here, its events come back to the loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.data.chat_template import prompt_ids, render
from slimtune.engine.engine import Engine
from slimtune.engine.model import stop_tokens
from slimtune.engine.request import EngineStats, Handle, LoadedAdapter, Request, SamplingParams, TokenEvent
from slimtune.errors import ConfigError, SlimtuneError
from slimtune.serve.backend import GenerationRequest, Piece, TokenLogprob, no_embeddings
from slimtune.serve.grammar import ANY_OBJECT, Grammars
from slimtune.serve.openai import (
    ApiError,
    ChatCompletionRequest,
    JsonFormat,
    SchemaFormat,
    bad_request,
    unavailable,
)  # fmt: skip
from slimtune.serve.queue import Turns
from slimtune.serve.tools import ToolReader, call_schema, for_template, knows_tools


@dataclass(frozen=True)
class _Prepared:
    """The prompts of a request as token ids, and how long their answers may be."""

    prompts: list[tuple[int, ...]]
    most: list[int]
    first: SamplingParams
    """Of the first answer: a mistake in it is told before any is begun."""


class EngineBackend:
    """Answers of an engine.

    Args:
        engine: not started yet.
    """

    takes_turns = True

    def __init__(self, engine: Engine) -> None:
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.slots, self.context = engine.slots, engine.context
        # The width of the logits, which may be padded beyond the tokenizer's tokens.
        self.vocabulary: int = engine.model.get_output_embeddings().weight.shape[0]
        # In characters; bytes that are one character are several of the vocabulary's own.
        self._longest_token = max(map(len, self.tokenizer.get_vocab()), default=1)
        self._grammars = Grammars(self.tokenizer, self.vocabulary, sorted(stop_tokens(engine.model, self.tokenizer)))
        # One thread, for a tokenizer is not safe in several; and apart from the loop, which long prompts would hold up.
        self._encoding = ThreadPoolExecutor(1, "slimtune-encode")
        self._mailbox: Mailbox | None = None

    async def start(self) -> None:
        """Start the engine's thread."""
        self._mailbox = Mailbox(asyncio.get_running_loop())
        # On this thread, which has loaded the model and now lets go of its workers; it takes no time.
        self.engine.start()

    async def stop(self) -> None:
        """Stop the engine's thread."""
        await asyncio.to_thread(self.engine.stop, drain=False)
        self._encoding.shutdown(wait=False, cancel_futures=True)

    async def is_ready(self) -> bool:
        """Whether the engine was started."""
        return self._mailbox is not None

    def stats(self) -> EngineStats:
        """Where the engine stands."""
        return self.engine.stats()

    async def load_adapter(self, name: str, folder: Path) -> LoadedAdapter:
        """Load an adapter beside the others, which answer on."""
        return await asyncio.to_thread(self.engine.load_adapter, name, folder)

    async def unload_adapter(self, name: str) -> None:
        """Free the memory of an adapter."""
        await asyncio.to_thread(self.engine.unload_adapter, name)

    async def embed(self, texts: list[str]) -> tuple[list[list[float]], int]:
        """Raises: ApiError."""
        return await no_embeddings()

    async def answer(
        self, body: GenerationRequest, adapter: str | None, tenant: str, turns: Turns
    ) -> AsyncGenerator[Piece, None]:
        """The answers, piece by piece, in the order in which their tokens come."""
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._encoding, self._prepare, body, adapter)
        # Told before the first token: the prompt is charged for, though the client may go while it is read.
        yield Piece(prompt_tokens=sum(map(len, prepared.prompts)))
        # Without a bound: the engine's thread must never wait for a client; `max_tokens` bounds what can pile up.
        inbox: asyncio.Queue[tuple[int, Sequence[TokenEvent] | BaseException]] = asyncio.Queue()
        count = body.choices()
        readers = [self._reader(body) for _ in range(count)]
        mailbox = self._mailbox
        assert mailbox is not None, "a backend is started before it is asked"
        handles: list[Handle] = []
        held = {0: turns.first}
        owner = body.owner(tenant)

        def begin(choice: int, sampling: SamplingParams) -> None:
            # Choices are numbered prompt by prompt, n of each, as OpenAI numbers them.
            request = Request(prepared.prompts[choice // body.n], sampling, adapter, owner)
            handles.append(self._submit(request, mailbox.address(inbox, choice)))

        async def begin_others() -> None:
            # Each at a turn of its own: a request of many answers would keep everybody else waiting.
            try:
                for choice in range(1, count):
                    held[choice] = await turns.take()
                    most = prepared.most[choice // body.n]
                    begin(choice, await loop.run_in_executor(self._encoding, self._sampling, body, most, choice))
            except Exception as error:
                inbox.put_nowait((0, error))

        others = asyncio.create_task(begin_others()) if count > 1 else None
        try:
            begin(0, prepared.first)
            running = count
            while running:
                choice, events = await inbox.get()
                if isinstance(events, BaseException):
                    raise events
                piece = self._piece(choice, events, readers[choice])
                if piece.finish_reason is not None:
                    running -= 1
                    turns.give_back(held.pop(choice))
                yield piece
        finally:
            # Also where the client has gone in the middle; what has ended takes no notice.
            if others is not None:
                others.cancel()
            for handle in handles:
                handle.cancel()

    def _submit(self, request: Request, on_events: Callable[[Sequence[TokenEvent]], None]) -> Handle:
        try:
            return self.engine.submit(request, on_events)
        except SlimtuneError as error:
            # Such as a prompt that leaves no room for the virtual tokens of its adapter.
            raise bad_request(str(error)) from error

    def _piece(self, choice: int, events: Sequence[TokenEvent], reader: ToolReader | None) -> Piece:
        last = events[-1]
        if last.finish_reason == "error":
            raise ApiError(500, f"the answer failed: {last.error}", "engine_error", kind="server_error")
        if last.finish_reason == "cancelled":
            raise unavailable("the server is stopping, and the answer was not finished", code="stopping")
        tokens = sum(event.token >= 0 for event in events)
        logprobs = tuple(self._logprob(event) for event in events if event.token >= 0 and event.logprob is not None)
        text, reason, calls = "".join(event.text for event in events), last.finish_reason, ()
        if reader is not None:
            text = reader.feed(text)
            if reason is not None:
                rest, calls = reader.finish()
                text, reason = text + rest, "tool_calls" if calls else reason
        return Piece(choice, text, tokens, 0, logprobs, calls, reason)

    def _logprob(self, event: TokenEvent) -> TokenLogprob:
        others = tuple((self.tokenizer.decode([token]), logprob) for token, logprob in event.alternatives)
        return TokenLogprob(self.tokenizer.decode([event.token]), float(event.logprob or 0.0), others)

    @staticmethod
    def _reader(body: GenerationRequest) -> ToolReader | None:
        if not isinstance(body, ChatCompletionRequest) or not body.usable_tools():
            return None
        return ToolReader(body.usable_tools(), body.must_call(), not body.parallel_tool_calls)

    def _prepare(self, body: GenerationRequest, adapter: str | None) -> _Prepared:
        """Render, encode and check a request. Raises: ApiError 400."""
        try:
            self._check_length(body)
            prompts = [tuple(prompt) for prompt in self._encode(body)]
            virtual = self.engine.virtual_tokens(adapter)
            most = [self._room(body, len(prompt), virtual) for prompt in prompts]
            return _Prepared(prompts, most, self._sampling(body, most[0], 0))
        except SlimtuneError as error:
            raise bad_request(str(error)) from error

    def _check_length(self, body: GenerationRequest) -> None:
        """Refuse what can't fit before it is encoded, for which others wait. Raises: ApiError."""
        texts = (
            [message.text() for message in body.messages] if isinstance(body, ChatCompletionRequest) else body.prompts()
        )
        for text in texts:
            least = len(text) // self._longest_token if isinstance(text, str) else len(text)
            if least > self.context:
                raise self._too_long(body, f"the prompt has {least:,} or more")

    def _encode(self, body: GenerationRequest) -> list[list[int]]:
        if isinstance(body, ChatCompletionRequest):
            tools = [tool.model_dump(exclude_none=True) for tool in body.usable_tools()]
            if tools and not knows_tools(self.tokenizer):
                raise bad_request("this model's chat template shows no tools to it; leave tools out", "tools")
            turns = [for_template(message) for message in body.messages]
            return [prompt_ids(self.tokenizer, render(self.tokenizer, turns, for_answer=True, tools=tools))]
        return [self._ids(prompt) for prompt in body.prompts()]

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
            if not ids:
                raise bad_request("prompt is empty as tokens; pass a longer one", "prompt")
            return ids
        if max(prompt) >= self.vocabulary:
            raise bad_request(f"prompt holds the token {max(prompt)}; the model has {self.vocabulary:,}", "prompt")
        return prompt

    def _room(self, body: GenerationRequest, prompt: int, virtual: int) -> int:
        """The most tokens of the answer. Raises: ApiError, where they don't fit behind the prompt."""
        most, room = body.most_tokens(), self.context - prompt - virtual
        if room < 1 or (most is not None and most > room):
            wanted = f" and {most:,} of the answer" if most is not None and room >= 1 else ""
            before = f"{virtual:,} virtual tokens of the adapter, " if virtual else ""
            raise self._too_long(body, f"there are {before}{prompt:,} of the prompt{wanted}", lower=bool(wanted))
        return room if most is None else most

    def _too_long(self, body: GenerationRequest, found: str, lower: bool = False) -> ApiError:
        return bad_request(
            f"the context holds {self.context:,} tokens, but {found}; shorten the prompt"
            f"{' or lower max_tokens' if lower else ''}",
            "messages" if isinstance(body, ChatCompletionRequest) else "prompt",
            "context_length_exceeded",
        )

    def _sampling(self, body: GenerationRequest, most: int, choice: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=most,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(body.top_k, 0),
            min_p=body.min_p,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            # Each answer draws of its own, or all would be the same.
            seed=None if body.seed is None else (body.seed + choice) % 2**63,
            stop=body.stops(),
            logprobs=body.alternatives(),
            ignore_eos=body.ignore_eos,
            constraint=self._constraint(body),
        )

    def _constraint(self, body: GenerationRequest) -> Any:
        """A new constraint for each answer, since it moves along with it."""
        if isinstance(body, ChatCompletionRequest) and body.must_call():
            return self._grammars.matching(call_schema(body.usable_tools()))
        if isinstance(body.response_format, JsonFormat):
            return self._grammars.matching(ANY_OBJECT)
        if isinstance(body.response_format, SchemaFormat):
            try:
                return self._grammars.matching(body.response_format.json_schema.schema_)
            except ConfigError as error:
                raise bad_request(str(error), "response_format") from error
        return None


class Mailbox:
    """Carries events from the engine's thread to the loop: all that come in one step by one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._lock = loop, threading.Lock()
        self._letters: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._is_woken = False

    def address(self, inbox: asyncio.Queue[Any], choice: int) -> Callable[[Sequence[TokenEvent]], None]:
        """What the engine calls with the events of one answer."""

        def post(events: Sequence[TokenEvent]) -> None:
            if not events:
                return
            with self._lock:
                self._letters.append((inbox, (choice, tuple(events))))
                # Each wake-up of the loop is a write to a pipe: one for all answers of a step, not one for each.
                wakes, self._is_woken = not self._is_woken, True
            if wakes and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._deliver)

        return post

    def _deliver(self) -> None:
        with self._lock:
            # Taken out before any is delivered: what is posted meanwhile wakes the loop again.
            letters, self._letters, self._is_woken = self._letters, deque(), False
        for inbox, letter in letters:
            inbox.put_nowait(letter)
