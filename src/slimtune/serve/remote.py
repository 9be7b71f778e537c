"""Other servers with OpenAI's API as a backend, one or several replicas: vLLM, which loads adapters, or any other."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from slimtune.engine.request import LoadedAdapter
from slimtune.errors import AdapterFileError, ConfigError
from slimtune.models.compatibility import largest_rank, verdicts
from slimtune.models.headers import read_folder, read_object
from slimtune.serve.backend import GenerationRequest, Piece, TokenLogprob
from slimtune.serve.convert import CONVERTED, convert_to_lora
from slimtune.serve.openai import ApiError, ChatCompletionRequest, bad_request, unavailable
from slimtune.serve.queue import Turns
from slimtune.serve.registry import digest_of
from slimtune.storage.source import ADAPTER

logger = logging.getLogger("slimtune.serve")

_CONNECT_SECONDS, _LOAD_SECONDS = 5.0, 300.0
_WAYS_OUT = (
    "serve it with --engine embedded, or merge it (slimtune merge) and serve the merged model by a process of its own"
)


@dataclass(eq=False)
class Replica:
    """One of the servers."""

    url: str
    running: int = 0


class RemoteBackend:
    """Answers of other servers; each request goes to the one with the fewest running, and on to another if it is down.

    What one of them keeps of prompts is told apart by tenant where it is vLLM; of others nothing is known.

    Args:
        urls: without `/v1`. All serve the same model.
        model: what they call the base.
        slots: answers asked for at once, over all servers.
        key: their API key.
        converted: where adapters are written as LoRA that are not, but can be; a folder that the servers see, too.
        loads: whether adapters are loaded into them, as vLLM can; else their folders are names of models there.
    """

    takes_turns = False

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        slots: int,
        key: str | None = None,
        loads: bool = True,
        converted: Path | None = None,
    ) -> None:
        self.replicas = [Replica(url.rstrip("/").removesuffix("/v1")) for url in urls]
        self.model, self.slots, self.loads, self.converted = model, slots, loads, converted
        # The names by which the servers know the adapters, and the folders to load them again after a restart.
        self._names: dict[str, str] = {}
        self._folders: dict[str, Path] = {}
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._client: httpx.AsyncClient | None = None

    async def start(self) -> None:
        """Open connections."""
        # No time between two bytes is too long: the gateway bounds the whole request.
        timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.slots)
        self._client = httpx.AsyncClient(headers=self._headers, timeout=timeout, limits=limits)

    async def stop(self) -> None:
        """Close them."""
        await self._http.aclose()

    @property
    def _http(self) -> httpx.AsyncClient:
        assert self._client is not None, "a backend is started before it is asked"
        return self._client

    async def is_ready(self) -> bool:
        """Whether one of the servers answers."""
        return any(await asyncio.gather(*(self._is_up(replica) for replica in self.replicas)))

    async def _is_up(self, replica: Replica) -> bool:
        try:
            return (await self._http.get(f"{replica.url}/v1/models", timeout=_CONNECT_SECONDS)).is_success
        except httpx.HTTPError:
            return False

    def stats(self) -> None:
        """They have metrics of their own."""

    async def embed(self, texts: list[str]) -> tuple[list[list[float]], int]:
        """Vectors, where the servers run an encoder. Raises: ApiError."""
        replica = self._order()[0]
        try:
            response = await self._http.post(f"{replica.url}/v1/embeddings", json={"model": self.model, "input": texts})
        except httpx.HTTPError as error:
            raise _down(replica, error) from error
        if not response.is_success:
            raise _refused(response.status_code, response.text)
        answer = response.json()
        return [entry["embedding"] for entry in answer["data"]], answer["usage"]["prompt_tokens"]

    # -- Adapters.

    async def load_adapter(self, name: str, folder: Path) -> LoadedAdapter:
        """Load an adapter into all servers, or none. Raises: AdapterFileError, ConfigError, ApiError."""
        if not self.loads:
            self._names[name] = str(folder)
            return LoadedAdapter(name, "remote", None, 0)
        folder = await asyncio.to_thread(self._as_lora, folder)
        method, rank, stored_bytes = checked_for_vllm(folder)
        # vLLM keeps keys and values by the name of an adapter: a name must never stand for other weights.
        remote = f"{name.replace('@', '-v')}-{await asyncio.to_thread(digest_of, folder)}"
        done: list[Replica] = []
        for replica in self.replicas:
            try:
                await self._load_into(replica, remote, folder)
            except (AdapterFileError, ApiError):
                for other in done:
                    await self._unload_from(other, remote)
                raise
            done.append(replica)
        self._names[name], self._folders[name] = remote, folder
        return LoadedAdapter(name, method, rank, stored_bytes)

    def _as_lora(self, folder: Path) -> Path:
        """The folder, or that of the adapter written as LoRA. Raises: AdapterFileError."""
        method = read_object(folder / ADAPTER).get("peft_type")
        if method not in CONVERTED:
            return folder
        if self.converted is None:
            raise AdapterFileError(
                f"vLLM does not take {folder.name}: {method} is not LoRA, but can be written as such; pass --converted "
                "DIR, a folder that the servers see, too"
            )
        output = self.converted / f"{folder.name}-{digest_of(folder)}"
        if not (output / ADAPTER).is_file():
            lost = convert_to_lora(folder, output)
            logger.info("%s (%s) is written as LoRA to %s; %.1g of an update is missing", folder, method, output, lost)
        return output

    async def _load_into(self, replica: Replica, name: str, folder: Path) -> None:
        body = {"lora_name": name, "lora_path": str(folder.resolve())}
        try:
            response = await self._http.post(
                f"{replica.url}/v1/load_lora_adapter", json=body, timeout=httpx.Timeout(_LOAD_SECONDS)
            )
        except httpx.HTTPError as error:
            raise _down(replica, error) from error
        if response.status_code == 404:
            raise ConfigError(
                f"{replica.url} loads no adapters; start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            )
        # Where the gateway was started anew the server still has it: the name stands for what is in the files.
        if not response.is_success and "already" not in response.text:
            raise AdapterFileError(f"{replica.url} refused '{name}': {_message(response.text)}")

    async def unload_adapter(self, name: str) -> None:
        """Take an adapter out of all servers that answer."""
        remote = self._names.pop(name)
        if self._folders.pop(name, None) is not None:
            await asyncio.gather(*(self._unload_from(replica, remote) for replica in self.replicas))

    async def _unload_from(self, replica: Replica, name: str) -> None:
        try:
            await self._http.post(f"{replica.url}/v1/unload_lora_adapter", json={"lora_name": name})
        except httpx.HTTPError:
            # A server that is down holds nothing.
            return

    # -- Answers.

    def _order(self) -> list[Replica]:
        # Stable: of equally busy ones the first, so that a quiet gateway fills one cache of prefixes and not several.
        return sorted(self.replicas, key=lambda replica: replica.running)

    async def answer(
        self, body: GenerationRequest, adapter: str | None, tenant: str, turns: Turns
    ) -> AsyncGenerator[Piece, None]:
        """The answers of the first server that takes the request, piece by piece."""
        kind = "chat/completions" if isinstance(body, ChatCompletionRequest) else "completions"
        forwarded = _forwarded(body, self.model if adapter is None else self._names[adapter])
        if self.loads:
            # vLLM would let tenants share what it keeps of prompts, and a first token that comes sooner than it could
            # tells one of them what another has asked.
            forwarded["cache_salt"] = hashlib.sha256(body.owner(tenant).encode()).hexdigest()
        failure: ApiError | None = None
        for replica in self._order():
            replica.running += 1
            try:
                async with aclosing(self._answer_of(replica, kind, forwarded, adapter, body.choices())) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            except _NotBegunError as error:
                failure = error.reason
            finally:
                replica.running -= 1
        raise failure or unavailable("no server answers")

    async def _answer_of(
        self, replica: Replica, kind: str, body: Mapping[str, Any], adapter: str | None, choices: int
    ) -> AsyncGenerator[Piece, None]:
        is_again = False
        while True:
            try:
                async with self._http.stream("POST", f"{replica.url}/v1/{kind}", json=body) as response:
                    if response.status_code == 404 and adapter in self._folders and not is_again:
                        # It was started anew and has forgotten its adapters.
                        is_again = True
                    elif not response.is_success:
                        text = (await response.aread()).decode(errors="replace")
                        raise _refused(response.status_code, text)
                    else:
                        async for piece in _pieces(response, choices):
                            yield piece
                        return
            # Only before a byte was sent is it safe to ask another server: else one request may run twice.
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                raise _NotBegunError(_down(replica, error)) from error
            except httpx.HTTPError as error:
                raise _down(replica, error) from error
            assert adapter is not None
            await self._load_into(replica, self._names[adapter], self._folders[adapter])


class _NotBegunError(Exception):
    """A server that did not take the request, so that another one may."""

    def __init__(self, reason: ApiError) -> None:
        super().__init__(reason.message)
        self.reason = reason


def _forwarded(body: GenerationRequest, model: str) -> dict[str, Any]:
    """The request as the servers get it: what the client gave, always as a stream, so that who leaves is noticed."""
    given = body.model_dump(exclude_unset=True, by_alias=True, exclude={"user"})
    return given | {"model": model, "stream": True, "stream_options": {"include_usage": True}}


async def _pieces(response: httpx.Response, choices: int) -> AsyncIterator[Piece]:
    """The pieces of a stream of server-sent events. Raises: ApiError."""
    counted, open_choices = 0, set(range(choices))
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            break
        try:
            chunk = json.loads(data)
        except ValueError as error:
            raise ApiError(502, "the server behind sent no JSON", "bad_gateway", kind="server_error") from error
        if "error" in chunk:
            raise ApiError(502, f"the server behind failed: {_message(data)}", "bad_gateway", kind="server_error")
        for choice in chunk.get("choices") or ():
            piece = _piece(choice)
            counted += piece.tokens
            if piece.finish_reason:
                open_choices.discard(piece.choice)
            yield piece
        usage = chunk.get("usage")
        if usage and not chunk.get("choices"):
            # One piece can hold several tokens; the rest is counted when it is told.
            rest = max(0, usage.get("completion_tokens", 0) - counted)
            yield Piece(tokens=rest, prompt_tokens=usage.get("prompt_tokens", 0))
    if open_choices:
        raise ApiError(502, "the server behind ended in the middle of the answer", "bad_gateway", kind="server_error")


def _piece(choice: Mapping[str, Any]) -> Piece:
    delta = choice.get("delta") or {"content": choice.get("text")}
    text, calls = delta.get("content") or "", tuple(delta.get("tool_calls") or ())
    reason = choice.get("finish_reason")
    logprobs = _logprobs(choice.get("logprobs"))
    return Piece(choice.get("index", 0), text, int(bool(text or calls)), 0, logprobs, calls, reason)


def _logprobs(logprobs: Mapping[str, Any] | None) -> tuple[TokenLogprob, ...]:
    """Log probabilities of either form."""
    if not logprobs:
        return ()
    if logprobs.get("content"):
        return tuple(
            TokenLogprob(
                entry["token"],
                entry["logprob"],
                tuple((other["token"], other["logprob"]) for other in entry.get("top_logprobs") or ()),
            )
            for entry in logprobs["content"]
        )
    tops = logprobs.get("top_logprobs") or [{}] * len(logprobs.get("tokens") or ())
    entries = zip(logprobs.get("tokens") or (), logprobs.get("token_logprobs") or (), tops, strict=False)
    return tuple(TokenLogprob(token, logprob or 0.0, tuple((top or {}).items())) for token, logprob, top in entries)


def _refused(status: int, text: str) -> ApiError:
    """What a client is told of a refusal: its own mistakes as they are, others as this server's."""
    if status in (400, 422):
        return bad_request(_message(text))
    if status in (429, 503):
        return unavailable("the server behind is busy; try again later")
    return ApiError(502, f"the server behind answered {status}: {_message(text)}", "bad_gateway", kind="server_error")


def _down(replica: Replica, error: Exception) -> ApiError:
    return unavailable(f"the server behind can't be reached ({type(error).__name__})", code="bad_gateway")


def _message(text: str) -> str:
    """The sentence in an error of another server."""
    try:
        value = json.loads(text)
        inner = value.get("error", value)
        return str(inner.get("message") if isinstance(inner, dict) else inner)[:500]
    except (ValueError, AttributeError):
        return text.strip()[:500] or "no reason given"


def checked_for_vllm(folder: Path) -> tuple[str, int | None, int]:
    """The method, the rank and the bytes of an adapter that vLLM takes. Raises: AdapterFileError, with the ways out."""
    stored = read_folder(folder, ADAPTER, "adapter_model*.safetensors")
    verdict = next(v for v in verdicts(stored.config, stored.tensors) if v.engine == "vLLM")
    if not verdict.takes:
        raise AdapterFileError(f"vLLM does not take {folder.name}: {verdict.note}; {_WAYS_OUT}")
    return str(stored.config.get("peft_type")), largest_rank(stored.config), stored.stored_bytes
