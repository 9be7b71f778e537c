"""The engine as its users see it: started and stopped, asked, given adapters, by any thread.

One thread at a time drives its scheduler: its own after `start`, else whichever generates.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from slimtune.adapters.model import add_drafted, draft_for_inference
from slimtune.core.config import PeftConfig
from slimtune.engine.adapters import ServedAdapter, detach_served, served
from slimtune.engine.answer import Answer, OnEvents, completion
from slimtune.engine.model import attention_by_name, causal_model_slots, stop_tokens
from slimtune.engine.request import Completion, EngineStats, Handle, LoadedAdapter, Request, TokenEvent
from slimtune.engine.sampling import Sampler
from slimtune.engine.scheduler import Scheduler
from slimtune.engine.slots import ATTENTION
from slimtune.engine.text import TextStream, check_tokenizer
from slimtune.engine.weights import reordered_weights
from slimtune.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    ConfigError,
    check_whole,
    did_you_mean,
    first_line,
    listing,
)
from slimtune.ops.worker_threads import release_worker_threads
from slimtune.storage.peft_format import adapter_folder, read_adapter


class Engine:
    """Answers many requests at once with one causal language model, each under its own adapter.

    Args:
        model: on its device; while the engine runs it belongs to it.
        slots: the most answers that are written at once; None is 16, or as many as the free memory holds.
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
        self, model: Any, tokenizer: Any, *, slots: int | None = None, context: int | None = None,
        prefill_chunk: int = 256, rank_budget: int | None = None,
    ) -> None:  # fmt: skip
        if slots is not None:
            check_whole("slots", slots)
        check_whole("prefill_chunk", prefill_chunk)
        check_tokenizer(tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.prefill_chunk = prefill_chunk
        if rank_budget is None:
            rank_budget = int(model.config.get_text_config().hidden_size // 4)
        check_whole("rank_budget", rank_budget, least=0)
        memory = causal_model_slots(model, slots, context)
        self.slots, self.context = memory.slots, memory.context
        self._vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self._served = {name: served(model, name, name) for name in getattr(model, "peft_config", {})}
        # What others want done to the model between two steps; the loop's thread alone touches it.
        self._commands: deque[Callable[[], None]] = deque()
        self._attachments = 0
        # One lock for all that threads share here; reentrant, because `fail` and `_finish` take it inside of it.
        self._wakes = threading.Condition(threading.RLock())
        self._scheduler = Scheduler(
            model, memory, prefill_chunk, rank_budget, stop_tokens(model, tokenizer), self._wakes
        )
        # Held by whoever drives the steps: a generate() of one thread waits for that of another.
        self._turn = threading.RLock()
        # Held by whoever changes the adapters, above both: a draft goes over the modules of the model, and none may
        # come or go meanwhile.
        self._changes = threading.RLock()
        self._thread: threading.Thread | None = None
        self._stopping = False
        # What `start` changed about the model, to be undone by `stop`.
        self._started = ExitStack()

    # -- Starting and stopping.

    def start(self) -> None:
        """Run the loop on a thread of its own until `stop`."""
        if self._thread is not None:
            raise ConfigError("the engine runs already; call stop() before start()")
        self._stopping = False
        with self._turn, self._changes:
            self._started.enter_context(reordered_weights(self.model))
        # The caller, who has loaded the model, hands its products over to the loop.
        release_worker_threads()
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
            thread = self._thread
        if thread is None:
            return
        thread.join(timeout)
        if thread.is_alive():
            self._cancel_all()
            thread.join()
        with self._turn, self._changes:
            self._started.close()

    def _cancel_all(self) -> None:
        with self._wakes:
            for answer in self._scheduler.answers:
                answer.handle.cancel()

    def _loop(self) -> None:
        with self._driving():
            self._serve()
        with self._wakes:
            self._thread = None
            # What came in the meantime has nobody else to run it.
            self._run_commands()

    def _serve(self) -> None:
        """Step until the engine is stopped and all answers have ended."""
        while True:
            with self._wakes:
                # In a loop: a condition may wake without cause, and what woke it may be gone.
                while not (self._commands or self._scheduler.answers or self._stopping):
                    self._wakes.wait()
                if self._stopping and not (self._commands or self._scheduler.answers):
                    return
            try:
                self._step()
            except Exception as error:
                # Nobody would be told of it, and whoever asks would wait for ever.
                for answer in self._scheduler.answers:
                    self._scheduler.fail(answer, f"the engine failed: {first_line(error)}")

    @contextmanager
    def _driving(self, requests: Sequence[Request] = ()) -> Iterator[None]:
        """While this thread runs the steps, of these requests alone, and the model's layers read from the slots."""
        steps = sum(request.sampling.max_tokens for request in requests) // self.slots
        with self._turn, reordered_weights(self.model, steps), attention_by_name(self.model, ATTENTION):
            # Until now the model was its owner's, who may have trained an adapter.
            self._scheduler.product.forget()
            yield

    def _step(self) -> None:
        self._run_commands()
        self._scheduler.step()

    def _run_commands(self) -> None:
        with self._wakes:
            # Taken out under the lock and run outside of it: an attach takes seconds, and submit() must not wait for
            # it.
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()

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
            self._scheduler.waiting.append(answer)
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
        room = self.context - virtual
        if len(request.prompt) >= room:
            raise ConfigError(
                f"the prompt has {len(request.prompt)} tokens, and the context of {self.context} leaves room "
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
        is_served = self._thread is not None
        try:
            for index, request in enumerate(requests):
                handles.append(self.submit(request, lambda new, index=index: receive(index, new)))
            with nullcontext() if is_served else self._driving(requests):
                for count in range(len(requests)):
                    # Served, another thread steps and this one sleeps; else it steps by itself whenever no answer is
                    # done.
                    while not done.acquire(blocking=is_served):
                        self._step()
                    if progress:
                        progress(count + 1, len(requests))
        except BaseException:
            for handle in handles:
                handle.cancel()
            if not is_served:
                self._scheduler.drop_cancelled()
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
        tensors = read_adapter(source)

        def attach() -> LoadedAdapter:
            with self._wakes:
                self._check_new(name)
            add_drafted(self.model, attached_as, config, drafted)
            adapter = served(self.model, name, attached_as)
            self._served[name] = adapter
            return adapter.loaded

        with self._changing():
            try:
                drafted = draft_for_inference(self.model, attached_as, config, tensors, source)
            finally:
                release_worker_threads()
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
                for answer in self._scheduler.answers:
                    if answer.adapter is adapter:
                        self._scheduler.fail(answer, f"the adapter '{name}' was unloaded")
            if adapter.requests:
                return False
            detach_served(self.model, adapter)
            self._scheduler.forget(adapter)
            del self._served[name]
            return True

        while True:
            with self._changing():
                if self._between_steps(left):
                    return
            if self._thread is None:
                with self._driving():
                    self._step()

    def _changing(self) -> threading.RLock:
        """The lock of whoever changes the adapters; the turn itself where each thread drives its own steps."""
        return self._turn if self._thread is None else self._changes

    def _between_steps(self, command: Callable[[], Any]) -> Any:
        """What a command gives, run where no step runs. Raises: what it raises."""
        if threading.current_thread() is self._thread:
            raise ConfigError("adapters are loaded and unloaded by another thread than the engine's own")
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(command())
            except BaseException as error:
                future.set_exception(error)

        with self._wakes:
            is_served = self._thread is not None
            if is_served:
                self._commands.append(run)
                self._wakes.notify_all()
        if not is_served:
            # Where another thread generates, after its turn.
            with self._turn:
                run()
        return future.result()

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """The adapters that requests can name."""
        with self._wakes:
            return {name: adapter.loaded for name, adapter in self._served.items() if not adapter.leaving}

    def virtual_tokens(self, name: str | None) -> int:
        """How many tokens of the context stand before a prompt under this adapter.

        Raises:
            AdapterNotFoundError: no adapter of that name is loaded.
        """
        with self._wakes:
            return 0 if name is None else self._adapter(name).virtual

    def stats(self) -> EngineStats:
        """Where the engine stands."""
        with self._wakes:
            running, counters = len(self._scheduler.running), self._scheduler.counters
            return EngineStats(
                waiting=len(self._scheduler.waiting),
                running=running,
                free_slots=self.slots - running,
                tokens_generated=counters.tokens,
                prompt_tokens=counters.prompt_tokens,
                steps=counters.steps,
                adapter_bytes=sum(adapter.loaded.bytes for adapter in self._served.values()),
            )
