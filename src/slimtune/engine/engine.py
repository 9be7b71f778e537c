"""The loop: requests are admitted to slots, read in pieces, answered token by token, all in one packed forward a step.

A step takes one token of every answer that is being written and up to `prefill_chunk` tokens of prompts, whatever
their adapters. Adapters that change parameters which all rows share get a forward of their own, in the same round.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.adapters.model import add_drafted, draft_for_inference
from slimtune.adapters.rows import BASE, RowAdapters
from slimtune.core.config import PeftConfig
from slimtune.engine.adapters import ServedAdapter, detach_served, served
from slimtune.engine.answer import Answer, OnEvents, Remains, completion
from slimtune.engine.model import attention_by_name, causal_model_slots, forward_of, stop_tokens
from slimtune.engine.product import RowProduct
from slimtune.engine.request import (
    Completion,
    EngineStats,
    FinishReason,
    Handle,
    LoadedAdapter,
    Request,
    TokenEvent,
)
from slimtune.engine.sampling import NO_NUMBERS, SampledToken, Sampler, sample
from slimtune.engine.slots import ATTENTION, Piece, Step
from slimtune.engine.text import TextStream, check_tokenizer
from slimtune.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    ConfigError,
    check_whole,
    did_you_mean,
    first_line,
    listing,
)
from slimtune.storage.peft_format import adapter_folder, read_adapter


@dataclass
class Counters:
    """What has happened since the start."""

    tokens: int = 0
    prompt_tokens: int = 0
    steps: int = 0


class Engine:
    """Answers many requests at once with one causal language model, each under its own adapter.

    Args:
        model: on its device; while the engine runs it belongs to it.
        slots: the most answers that are written at once.
        context: the most tokens of a prompt with its answer; None is the model's limit, 2,048 at most.
        prefill_chunk: the most prompt tokens in a step, so that a long prompt doesn't hold the other answers up.
        rank_budget: factors of adapters that left the batch stay at hand up to this sum of ranks; None is a quarter of
            the model's width, beyond which their products would cost more than they save.

    Raises:
        ConfigError: a model or tokenizer that can't be run so.

    Example:
        >>> engine = slimtune.Engine(model, tokenizer)
        >>> engine.load_adapter("support", "adapters/support")
        >>> engine.generate([Request(prompt=ids, adapter="support")])[0].text
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, slots: int = 16, context: int | None = None, prefill_chunk: int = 256,
        rank_budget: int | None = None,
    ) -> None:  # fmt: skip
        check_whole("slots", slots)
        check_whole("prefill_chunk", prefill_chunk)
        check_tokenizer(tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.slots, self.prefill_chunk = slots, prefill_chunk
        self._memory = causal_model_slots(model, slots, context)
        self.context = self._memory.context
        if rank_budget is None:
            rank_budget = model.config.get_text_config().hidden_size // 4
        check_whole("rank_budget", rank_budget, least=0)
        self._product = RowProduct(rank_budget)
        self._vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self._stop_tokens = stop_tokens(model, tokenizer)
        self._served = {name: served(model, name, name) for name in getattr(model, "peft_config", {})}
        self._waiting: deque[Answer] = deque()
        self._running: dict[int, Answer] = {}
        self._remains: dict[int, Remains] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._counters = Counters()
        self._attachments = 0
        self._wakes = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._stopping = False

    # -- Starting and stopping.

    def start(self) -> None:
        """Run the loop on a thread of its own until `stop`."""
        if self._thread is not None:
            raise ConfigError("the engine runs already; call stop() before start()")
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="slimtune-engine", daemon=True)
        self._thread.start()

    def stop(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, end those that run, and end the loop.

        Args:
            drain: let answers come to their end; else they are cancelled.
            timeout: after so many seconds those that still run are cancelled as well.
        """
        with self._wakes:
            self._stopping = True
            if not drain:
                self._cancel_all()
            self._wakes.notify_all()
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join(timeout)
        if thread.is_alive():
            self._cancel_all()
            thread.join()

    def _cancel_all(self) -> None:
        with self._wakes:
            for answer in (*self._waiting, *self._running.values()):
                answer.handle.cancel()

    def _loop(self) -> None:
        with self._attention():
            while True:
                with self._wakes:
                    while not (self._commands or self._waiting or self._running or self._stopping):
                        self._wakes.wait()
                    if self._stopping and not (self._commands or self._waiting or self._running):
                        return
                try:
                    self._step()
                except Exception as error:
                    # Nobody would be told of it, and whoever asks would wait for ever.
                    for answer in (*self._waiting, *self._running.values()):
                        self._fail(answer, f"the engine failed: {first_line(error)}")

    def _attention(self) -> Any:
        """While the model's layers read from the slots."""
        # Until now the model was its owner's, who may have trained an adapter.
        self._product.forget()
        return attention_by_name(self.model, ATTENTION)

    # -- Requests.

    def submit(self, request: Request, on_events: OnEvents) -> Handle:
        """Queue a request; its tokens are handed to `on_events` as they come, on the engine's thread.

        Raises:
            AdapterNotFoundError: no adapter of that name is loaded.
            ConfigError: a prompt that is too long or holds no token of the model, or an engine that was stopped.
        """
        with self._wakes:
            if self._stopping:
                raise ConfigError("the engine was stopped and takes no more requests; call start() again")
            adapter = None if request.adapter is None else self._adapter(request.adapter)
            self._check_prompt(request, adapter.virtual if adapter else 0)
            if adapter:
                adapter.requests += 1
            answer = Answer(
                handle=Handle(request),
                on_events=on_events,
                adapter=adapter,
                sampler=Sampler(request.sampling, frozenset(request.prompt)),
                text=TextStream(self.tokenizer, request.sampling.stop),
                tokens=list(request.prompt),
            )
            self._waiting.append(answer)
            self._wakes.notify_all()
            return answer.handle

    def _adapter(self, name: str) -> ServedAdapter:
        adapter = self._served.get(name)
        if adapter is None or adapter.leaving:
            known = [name for name, each in self._served.items() if not each.leaving]
            raise AdapterNotFoundError(
                f"no adapter '{name}' is loaded; there are {listing(known) or 'none'}{did_you_mean(name, known)}"
            )
        return adapter

    def _check_prompt(self, request: Request, virtual: int) -> None:
        room = self._memory.context - virtual
        if len(request.prompt) >= room:
            raise ConfigError(
                f"the prompt has {len(request.prompt)} tokens, and the context of {self._memory.context} leaves room "
                f"for {room - 1} and one of an answer; shorten it, or give the engine a longer context"
            )
        unknown = next((token for token in request.prompt if not 0 <= token < self._vocabulary), None)
        if unknown is not None:
            raise ConfigError(
                f"the prompt holds the token {unknown}, and the model has {self._vocabulary}; encode it with the "
                "model's own tokenizer"
            )

    def generate(
        self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None
    ) -> list[Completion]:
        """The answers to all requests, in their order; runs the loop itself unless it was started.

        Args:
            progress: is called with how many answers are done, of how many.

        Raises:
            SlimtuneError: as `submit`; or an answer failed, with what went wrong.
        """
        events: list[list[TokenEvent]] = [[] for _ in requests]
        done = threading.Semaphore(0)

        def receive(index: int, new: Sequence[TokenEvent]) -> None:
            events[index].extend(new)
            if new[-1].finish_reason:
                done.release()

        handles = []
        try:
            for index, request in enumerate(requests):
                handles.append(self.submit(request, lambda new, index=index: receive(index, new)))
            with nullcontext() if self._thread else self._attention():
                for count in range(len(requests)):
                    while self._thread is None and not done.acquire(blocking=False):
                        self._step()
                    if self._thread is not None:
                        done.acquire()
                    if progress:
                        progress(count + 1, len(requests))
        except BaseException:
            for handle in handles:
                handle.cancel()
            if self._thread is None:
                self._drop_cancelled()
            raise
        return [completion(request, own) for request, own in zip(requests, events, strict=True)]

    # -- Adapters.

    def load_adapter(self, name: str, folder: Path | str) -> LoadedAdapter:
        """Load an adapter from disk or the Hub while others are answered.

        Raises:
            AdapterExistsError: one of that name is loaded.
            AdapterFileError, BaseMismatchError, TargetError, ConfigError: it can't be; the engine is as it was.
        """
        with self._wakes:
            self._check_new(name)
            self._attachments += 1
            attached_as = f"served_{self._attachments}"
        # Files are read and tensors made here; only what touches the model waits for the end of a step.
        source = adapter_folder(folder, None)
        config = PeftConfig.from_pretrained(source)
        drafted = draft_for_inference(self.model, attached_as, config, read_adapter(source), source)

        def attach() -> LoadedAdapter:
            with self._wakes:
                self._check_new(name)
            add_drafted(self.model, attached_as, config, drafted)
            adapter = served(self.model, name, attached_as)
            self._served[name] = adapter
            return adapter.loaded

        return self._between_steps(attach)

    def _check_new(self, name: str) -> None:
        if name in self._served:
            raise AdapterExistsError(f"an adapter '{name}' is loaded already; unload it first, or name this anew")

    def unload_adapter(self, name: str, *, wait: bool = True) -> None:
        """Take an adapter off the model and free its memory; from now on no request can name it.

        Args:
            wait: for its requests to end; else they end here, with an error.

        Raises:
            AdapterNotFoundError: no adapter of that name is loaded.
        """
        with self._wakes:
            adapter = self._adapter(name)
            adapter.leaving = True

        def left() -> bool:
            if not wait:
                for answer in (*self._waiting, *self._running.values()):
                    if answer.adapter is adapter:
                        self._fail(answer, f"the adapter '{name}' was unloaded")
            if adapter.requests:
                return False
            detach_served(self.model, adapter)
            self._remains = {slot: r for slot, r in self._remains.items() if r.owner[1] != adapter.attached_as}
            self._product.forget()
            del self._served[name]
            return True

        while not self._between_steps(left):
            if self._thread is None:
                with self._attention():
                    self._step()

    def _between_steps(self, command: Callable[[], Any]) -> Any:
        """What a command gives, run where no step runs. Raises: what it raises."""
        if self._thread is None:
            return command()
        if threading.current_thread() is self._thread:
            raise ConfigError("adapters are loaded and unloaded by another thread than the engine's own")
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(command())
            except BaseException as error:
                future.set_exception(error)

        with self._wakes:
            self._commands.append(run)
            self._wakes.notify_all()
        return future.result()

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """The adapters that requests can name."""
        with self._wakes:
            return {name: adapter.loaded for name, adapter in self._served.items() if not adapter.leaving}

    def stats(self) -> EngineStats:
        """Where the engine stands."""
        with self._wakes:
            return EngineStats(
                waiting=len(self._waiting),
                running=len(self._running),
                free_slots=self.slots - len(self._running),
                tokens_generated=self._counters.tokens,
                prompt_tokens=self._counters.prompt_tokens,
                steps=self._counters.steps,
                adapter_bytes=sum(adapter.loaded.bytes for adapter in self._served.values()),
            )

    # -- One step.

    def _step(self) -> None:
        with self._wakes:
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        self._drop_cancelled()
        self._admit()
        groups: dict[ServedAdapter | None, list[Answer]] = {}
        for answer in self._running.values():
            groups.setdefault(answer.adapter if answer.adapter and answer.adapter.alone else None, []).append(answer)
        for alone, answers in groups.items():
            self._advance(answers, alone)
        self._counters.steps += bool(groups)

    def _drop_cancelled(self) -> None:
        with self._wakes:
            gone = [a for a in (*self._waiting, *self._running.values()) if a.handle.cancelled]
        for answer in gone:
            self._finish(answer, [TokenEvent(-1, "", finish_reason="cancelled")])

    def _admit(self) -> None:
        """Give free slots to those who wait, in their order; each begins with what its slot or another one knows."""
        with self._wakes:
            while self._waiting and len(self._running) < self.slots:
                answer = self._waiting.popleft()
                answer.slot, answer.read = self._place(answer)
                self._remains.pop(answer.slot, None)
                self._running[answer.slot] = answer
                self._counters.prompt_tokens += len(answer.tokens)

    def _place(self, answer: Answer) -> tuple[int, int]:
        """A free slot, and how many of the answer's positions it holds already."""
        free = [slot for slot in range(self.slots) if slot not in self._running]
        known = {slot: self._shared(answer, remains.owner, remains.tokens) for slot, remains in self._remains.items()}
        for slot, other in self._running.items():
            known[slot] = self._shared(answer, other.owner, other.tokens[: max(0, other.read - other.virtual)])
        best = max(known, key=lambda slot: (known[slot], slot in free), default=-1)
        if best >= 0 and known[best]:
            # The last token of a prompt is always read, for the logits behind it.
            slot = best if best in free else free[0]
            length = answer.virtual + known[best]
            if slot != best:
                self._memory.copy(best, slot, length)
            return slot, length
        # Low slots first: a step attends over the span of those that decode.
        slot = next((slot for slot in free if slot not in self._remains), free[0])
        if answer.adapter and answer.adapter.pairs:
            for layer, (keys_HND, values_HND) in enumerate(answer.adapter.pairs):
                self._memory.write(slot, layer, keys_HND, values_HND)
            return slot, answer.virtual
        return slot, 0

    def _shared(self, answer: Answer, owner: tuple[str, str], tokens: Sequence[int]) -> int:
        """How many tokens of a prompt a slot has read for the same tenant and adapter, but the last."""
        if owner != answer.owner:
            return 0
        most = min(len(tokens), len(answer.tokens) - 1)
        return next((i for i in range(most) if tokens[i] != answer.tokens[i]), most)

    @torch.inference_mode()
    def _advance(self, answers: list[Answer], alone: ServedAdapter | None) -> None:
        """One forward for these answers, and what comes of it."""
        try:
            ready, logits_NV = self._forward(answers, alone)
            chosen = sample(logits_NV, [answer.sampler for answer in ready]) if ready else []
        except Exception as error:
            by_adapter: dict[ServedAdapter | None, list[Answer]] = {}
            for answer in answers:
                by_adapter.setdefault(answer.adapter, []).append(answer)
            if len(by_adapter) > 1:
                # Whose fault it is shows when each adapter runs by itself; the others are answered.
                for own in by_adapter.values():
                    self._advance(own, None)
                return
            for answer in answers:
                self._fail(answer, first_line(error))
            return
        for answer, token in zip(ready, chosen, strict=True):
            try:
                self._take(answer, token)
            except Exception as error:
                self._fail(answer, first_line(error))

    def _forward(self, answers: list[Answer], alone: ServedAdapter | None) -> tuple[list[Answer], Tensor]:
        """The answers whose next token can be chosen now, with their logits (answers, vocabulary)."""
        decoding = [answer for answer in answers if answer.pending == 1]
        decoding.sort(key=lambda answer: answer.slot)
        taken = [(answer, 1) for answer in decoding]
        budget = self.prefill_chunk
        for answer in answers:
            length = 0 if answer.pending == 1 else min(answer.pending, budget)
            if length:
                budget -= length
                taken.append((answer, length))
        pieces = [Piece(answer.slot, answer.read, length) for answer, length in taken]
        step = Step(self._memory, pieces[: len(decoding)], pieces[len(decoding) :])
        ids, names, kept, ready, virtual = [], [], [], [], []
        for answer, length in taken:
            for position in range(answer.read - answer.virtual, answer.read - answer.virtual + length):
                if position < 0:
                    virtual.append((len(ids), answer.virtual_token(position)))
                ids.append(answer.tokens[position] if position >= 0 else 0)
            names += [answer.adapter.attached_as if answer.adapter else BASE] * length
            if length == answer.pending:
                kept.append(len(ids) - 1)
                ready.append(answer)
        settings = self._settings(alone, names, kept or [0])
        with step.running(), settings:
            logits_NV = forward_of(self.model, ids, step.position_T, kept or [0], virtual)
        for answer, length in taken:
            answer.read += length
        return ready, logits_NV

    def _settings(self, alone: ServedAdapter | None, names: list[str], kept: list[int]) -> Any:
        """Which adapters a forward runs through."""
        state = vars(self.model).get("adapter_state")
        if state is None:
            return nullcontext()
        if alone is not None:
            return state.using(applied=(alone.attached_as,), rows=None)
        return state.using(
            applied=(), rows=RowAdapters(tuple(names), kept=tuple(kept), packed=True, product=self._product)
        )

    def _take(self, answer: Answer, chosen: SampledToken | str) -> None:
        """Hand a token on, and end the answer where it is over."""
        if isinstance(chosen, str):
            if chosen == NO_NUMBERS:
                self._memory.clear(answer.slot)
                answer.read = 0
            self._fail(answer, chosen)
            return
        params = answer.request.sampling
        token = chosen.token
        answer.tokens.append(token)
        self._counters.tokens += 1
        reason: FinishReason | None = None
        if token in self._stop_tokens and not params.ignore_eos:
            text, reason = answer.text.finish(), "stop"
        else:
            answer.sampler.accept(token)
            text = answer.text.push(token)
            if answer.text.stopped:
                reason = "stop"
            elif answer.written >= params.max_tokens or answer.virtual + len(answer.tokens) >= self._memory.context:
                text, reason = text + answer.text.finish(), "length"
        event = TokenEvent(token, text, chosen.logprob, chosen.alternatives, reason)
        self._finish(answer, [event]) if reason else self._send(answer, [event])

    def _fail(self, answer: Answer, error: str) -> None:
        self._finish(answer, [TokenEvent(-1, "", finish_reason="error", error=error)])

    def _finish(self, answer: Answer, events: list[TokenEvent]) -> None:
        """Free the slot, which keeps what it has read for the next prompt that begins so."""
        with self._wakes:
            if answer.slot >= 0:
                del self._running[answer.slot]
                read = answer.tokens[: max(0, answer.read - answer.virtual)]
                self._remains[answer.slot] = Remains(answer.owner, read)
            else:
                self._waiting.remove(answer)
            if answer.adapter:
                answer.adapter.requests -= 1
        self._send(answer, events)

    def _send(self, answer: Answer, events: list[TokenEvent]) -> None:
        try:
            answer.on_events(events)
        except Exception:
            # Whoever asked can't be told; the others must go on.
            answer.handle.cancel()
