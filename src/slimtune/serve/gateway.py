"""A request from its key to its last token: limits, its turn, its adapter, its answer, and what is counted of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.errors import SlimtuneError
from slimtune.serve.backend import Backend, GenerationRequest, Piece
from slimtune.serve.metrics import Gauge, Metrics
from slimtune.serve.openai import ApiError, EmbeddingRequest, bad_request, not_found, unavailable
from slimtune.serve.queue import FairQueue, Limits
from slimtune.serve.registry import Adapter, Registry, inside
from slimtune.serve.tenants import BASE, Keyring, Tenant

logger = logging.getLogger("slimtune.serve")


@dataclass(frozen=True)
class GatewaySettings:
    """The bounds that hold for all tenants together.

    Attributes:
        base: the name of the base as it is shown.
        adapters: the folder under which adapters are loaded while the server runs.
        queue: the most requests that wait.
        queue_timeout: seconds that one waits at most.
        request_timeout: seconds from a request to its last token.
        max_body: bytes of a request's body.
        body_timeout: seconds in which it has to come.
    """

    base: str = BASE
    adapters: Path | None = None
    queue: int = 256
    queue_timeout: float = 60.0
    request_timeout: float = 600.0
    max_body: int = 4_000_000
    body_timeout: float = 30.0


class Gateway:
    """Everything between HTTP and a backend."""

    def __init__(self, backend: Backend, registry: Registry, keyring: Keyring, settings: GatewaySettings) -> None:
        self.backend, self.registry, self.keyring, self.settings = backend, registry, keyring, settings
        self.queue = FairQueue(backend.slots, settings.queue, settings.queue_timeout)
        self.limits, self.metrics = Limits(), Metrics()
        self.metrics.watch(self._gauges)
        self.is_draining = False
        self.started = time.time()
        # The loop holds tasks weakly: without this set one could be collected in the middle of an answer.
        self._running: set[asyncio.Task[None]] = set()

    def resolve(self, tenant: Tenant, model: str) -> Adapter | None:
        """The adapter that a model's name means, None for the base. Raises: ApiError 404, also for others' adapters."""
        if model in (BASE, self.settings.base) and tenant.may_use(BASE):
            return None
        adapter = self.registry.find(model)
        # One error for both: a 403 would tell that another tenant's adapter exists.
        if adapter is None or not tenant.may_use(adapter.name):
            raise not_found(model, [entry["id"] for entry in self.models(tenant)])
        return adapter

    def models(self, tenant: Tenant) -> list[dict[str, Any]]:
        """The base and the newest versions of the adapters that a tenant may use, as OpenAI lists models."""
        base = {"id": BASE, "object": "model", "created": int(self.started), "owned_by": "slimtune", "parent": None}
        base["root"] = self.settings.base
        listed = [base] if tenant.may_use(BASE) else []
        adapters = sorted(self.registry, key=lambda adapter: (adapter.name, adapter.version))
        return listed + [self._described(adapter, tenant) for adapter in adapters if tenant.may_use(adapter.name)]

    def _described(self, adapter: Adapter, tenant: Tenant) -> dict[str, Any]:
        newest = self.registry.find(adapter.name) is adapter
        described = {
            "id": adapter.name if newest else adapter.versioned,
            "object": "model",
            "created": int(adapter.created),
            "owned_by": "slimtune",
            "parent": BASE,
            "root": adapter.versioned,
            "method": adapter.method,
            "rank": adapter.rank,
            "state": adapter.state,
            "bytes": adapter.bytes or adapter.stored_bytes,
        }
        # Folders of the server, and errors that name them, are the admin's alone.
        return described | ({"path": str(adapter.folder), "error": adapter.error} if tenant.admin else {})

    def begin(self, tenant: Tenant, body: GenerationRequest) -> Answer:
        """Start to answer. Raises: ApiError, for what is wrong before it is anybody's turn."""
        self._require_open()
        adapter = self.resolve(tenant, body.model)
        if body.choices() > 1 and body.temperature == 0 and body.n > 1:
            raise bad_request("n answers at temperature 0 are all the same; raise temperature or leave n out", "n")
        # After the name is resolved: a misspelt model costs no part of the tenant's rate.
        self.limits.admit(tenant)
        answer = Answer(adapter.versioned if adapter else BASE)
        # A task of its own and not the request's: a slow reader of the stream must not hold a slot's pieces up.
        task = asyncio.create_task(self._produce(tenant, body, adapter, answer))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        answer.task = task
        return answer

    async def embed(self, tenant: Tenant, body: EmbeddingRequest) -> tuple[list[list[float]], int]:
        """Vectors of texts and their tokens. Raises: ApiError."""
        self._require_open()
        if self.resolve(tenant, body.model) is not None:
            raise bad_request("embeddings come from the base alone; pass model=base", "model")
        self.limits.admit(tenant)
        async with self.queue.turn(tenant):
            vectors, tokens = await self.backend.embed(body.texts())
            self._count(tenant, BASE, prompt_tokens=tokens)
            return vectors, tokens

    async def load_adapter(self, tenant: Tenant, name: str, path: str) -> Adapter:
        """Register an adapter, as a new version where the name is known, and load it. Raises: ApiError."""
        self._require_admin(tenant)
        self._require_open()
        try:
            adapter = self.registry.draft(name, inside(self.settings.adapters, path))
        except SlimtuneError as error:
            raise bad_request(str(error), "lora_path") from error
        try:
            async with self.registry.use(adapter):
                # Only now: until it has proved to load, its name goes on meaning the version from before.
                self.registry.enrol(adapter)
                return adapter
        except BaseException as error:
            # Whatever the reason: who has asked may have gone while it was loaded.
            await self.registry.unload(adapter)
            if isinstance(error, SlimtuneError):
                raise bad_request(str(error), "lora_path") from error
            raise

    async def unload_adapter(self, tenant: Tenant, name: str, force: bool = False) -> None:
        """Take an adapter away and wait until its memory is free. Raises: ApiError."""
        self._require_admin(tenant)
        adapter = self.registry.find(name)
        if adapter is None:
            raise not_found(name, [known.name for known in self.registry])
        if force:
            # A copy: a task that ends takes itself out of the set.
            for task in list(self._running):
                if task.get_name() == adapter.versioned:
                    task.cancel("the adapter was unloaded")
        await self.registry.unload(adapter)

    def _require_open(self) -> None:
        if self.is_draining:
            raise unavailable("the server is stopping; ask another one", code="stopping")

    @staticmethod
    def _require_admin(tenant: Tenant) -> None:
        if not tenant.admin:
            raise ApiError(403, "only an admin's key may do this", "forbidden", kind="permission_error")

    async def drain(self, timeout: float) -> bool:
        """Take no more requests and wait for those that run; False where some didn't end in time."""
        self.is_draining = True
        if not self._running:
            return True
        _, late = await asyncio.wait(self._running, timeout=timeout)
        for task in late:
            task.cancel()
        return not late

    async def _produce(self, tenant: Tenant, body: GenerationRequest, adapter: Adapter | None, answer: Answer) -> None:
        """Put the pieces of an answer into its inbox, then None; an error comes in place of what can't come."""
        task = asyncio.current_task()
        assert task is not None
        task.set_name(answer.model)
        began = last = time.monotonic()
        try:
            # The limit runs over waiting and writing together, as a client's own clock does.
            together = 1 if self.backend.takes_turns else body.choices()
            async with (
                asyncio.timeout(self.settings.request_timeout),
                self.queue.turn(tenant, together) as turns,
            ):
                self.metrics.queue_seconds.observe(time.monotonic() - began)
                async with (
                    self._loaded(adapter) as name,
                    aclosing(self.backend.answer(body, name, tenant.name, turns)) as pieces,
                ):
                    async for piece in pieces:
                        if piece.tokens:
                            now = time.monotonic()
                            is_first = last == began
                            seen = self.metrics.first_token_seconds if is_first else self.metrics.between_tokens_seconds
                            seen.observe(now - last)
                            last = now
                        self._count(tenant, answer.model, piece.prompt_tokens, piece.tokens)
                        answer.inbox.put_nowait(piece)
            self.metrics.request_seconds.observe(time.monotonic() - began)
        except ApiError as error:
            answer.inbox.put_nowait(error)
        except TimeoutError:
            limit = self.settings.request_timeout
            answer.inbox.put_nowait(
                ApiError(504, f"the answer was not finished within {limit:g} s", "timeout", kind="timeout_error")
            )
        except asyncio.CancelledError:
            self.metrics.cancelled.inc()
            answer.inbox.put_nowait(unavailable("the answer was broken off", code="cancelled"))
            raise
        except Exception as error:
            answer.inbox.put_nowait(_internal(error, answer.model))
        finally:
            # Always the last one: whoever reads waits for it, whatever has happened before.
            answer.inbox.put_nowait(None)

    @asynccontextmanager
    async def _loaded(self, adapter: Adapter | None) -> AsyncIterator[str | None]:
        if adapter is None:
            yield None
            return
        async with self.registry.use(adapter) as name:
            yield name

    def _count(self, tenant: Tenant, model: str, prompt_tokens: int = 0, tokens: int = 0) -> None:
        if not prompt_tokens and not tokens:
            return
        # Piece by piece: a long answer counts against its tenant while it is still written.
        self.queue.charge(tenant, prompt_tokens, tokens)
        self.limits.spend(tenant, prompt_tokens + tokens)
        for kind, count in (("prompt", prompt_tokens), ("generated", tokens)):
            if count:
                self.metrics.tokens.labels(tenant.name, model, kind).inc(count)

    def _gauges(self) -> Iterable[Gauge]:
        adapters, stats = list(self.registry), self.backend.stats()
        yield "requests_waiting", "Requests that wait for their turn", self.queue.waiting
        yield "answers_running", "Answers that are being written", self.queue.running
        yield "slots", "The most answers at once", self.queue.slots
        yield "adapters_registered", "Versions of adapters that requests can name", len(adapters)
        yield "adapters_loaded", "Those of them in memory", sum(adapter.state == "loaded" for adapter in adapters)
        yield "adapter_bytes", "Memory of the loaded adapters", sum(adapter.bytes for adapter in adapters)
        yield "adapter_evictions", "Adapters put out of memory for others", self.registry.evictions
        yield "draining", "1 while the server ends what runs and takes no more", self.is_draining
        if stats is not None:
            yield "engine_free_slots", "Slots of the engine without an answer", stats.free_slots
            yield "engine_waiting", "Answers that wait inside of the engine", stats.waiting
            yield "engine_steps", "Steps of the engine", stats.steps
            yield "engine_tokens_generated", "Tokens of all answers of the engine", stats.tokens_generated


def _internal(error: Exception, model: str) -> ApiError:
    """What a client is told of a failure: no path and no traceback, which the log has."""
    if isinstance(error, SlimtuneError):
        logger.error("%s: %s", model, error)
        message, code = f"'{model}' can't be loaded; the server's log says why", "adapter_broken"
    else:
        logger.error("%s failed", model, exc_info=error)
        message, code = f"the server failed ({type(error).__name__}); its log says why", "internal"
    return ApiError(500, message, code, kind="server_error")


class Answer:
    """The pieces of an answer as they come.

    Attributes:
        model: what answers, with its version.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.inbox: asyncio.Queue[Piece | ApiError | None] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None

    async def next(self) -> list[Piece]:
        """All pieces that have come, at least one; an empty list at the end. Raises: ApiError."""
        pieces: list[Piece] = []
        item = await self.inbox.get()
        while isinstance(item, Piece):
            pieces.append(item)
            if self.inbox.empty():
                return pieces
            item = self.inbox.get_nowait()
        if pieces:
            # First what was written, then why there is no more of it.
            self.inbox.put_nowait(item)
            return pieces
        if isinstance(item, ApiError):
            raise item
        return []

    def cancel(self) -> None:
        """Nobody reads on; what has ended takes no notice."""
        if self.task is not None:
            self.task.cancel()
