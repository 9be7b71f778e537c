"""The gateway over HTTP: routes, what every request passes before them, and errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import secrets
import struct
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slimtune.serve.backend import GenerationRequest
from slimtune.serve.gateway import Answer, Gateway
from slimtune.serve.openai import (
    ApiError,
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
    from_validation,
    not_found,
)
from slimtune.serve.responses import Responses, error_event
from slimtune.serve.tenants import Tenant

logger = logging.getLogger("slimtune.serve")

T = TypeVar("T")

_BODIES = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/load_lora_adapter": LoadAdapterRequest,
    "/v1/unload_lora_adapter": UnloadAdapterRequest,
}
_LOCAL_HOSTS = {"localhost", "127.0.0.1", "[::1]"}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}


def create_app(gateway: Gateway) -> FastAPI:
    """The application that a server such as uvicorn runs."""
    app = FastAPI(title="slimtune", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    # Read at the start: a server whose files are replaced under it goes on showing the page that fits it.
    page = (Path(__file__).parent / "page" / "index.html").read_text(encoding="utf-8")

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        return await _respond(gateway, body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _respond(gateway, body, request)

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        vectors, tokens = await _unless_gone(request, gateway.embed(_tenant(request), body))
        return JSONResponse(_embeddings(body, vectors, tokens))

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": gateway.models(_tenant(request))})

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> Response:
        listed = gateway.models(_tenant(request))
        entry = next((entry for entry in listed if name in (entry["id"], entry["root"])), None)
        if entry is None:
            raise not_found(name, [entry["id"] for entry in listed])
        return JSONResponse(entry)

    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadAdapterRequest, request: Request) -> Response:
        adapter = await gateway.load_adapter(_tenant(request), body.lora_name, body.lora_path)
        return JSONResponse({"id": adapter.name, "root": adapter.versioned, "state": adapter.state})

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadAdapterRequest, request: Request) -> Response:
        await gateway.unload_adapter(_tenant(request), body.lora_name, body.force)
        return JSONResponse({"id": body.lora_name, "state": "unloaded"})

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        is_ready = not gateway.is_draining and await gateway.backend.is_ready()
        status = "draining" if gateway.is_draining else "ready" if is_ready else "not ready"
        return JSONResponse({"status": status}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        if not _tenant(request).admin:
            raise ApiError(403, "only an admin's key may read the metrics", "forbidden", kind="permission_error")
        return Response(gateway.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_failure)
    app.add_middleware(Guard, gateway=gateway)
    return app


def _tenant(request: Request) -> Tenant:
    return request.scope["state"]["tenant"]


async def _respond(gateway: Gateway, body: GenerationRequest, request: Request) -> Response:
    answer = gateway.begin(_tenant(request), body)
    request.scope["state"]["model"] = answer.model
    responses = Responses(body, answer.model)
    try:
        # The first pieces are awaited before the status is sent, for a refusal needs a status of its own.
        pieces = await _unless_gone(request, answer.next())
        if body.stream:
            return _Stream(answer, responses, responses.events(pieces))
        while pieces:
            for piece in pieces:
                responses.add(piece)
            pieces = await _unless_gone(request, answer.next())
        return JSONResponse(responses.whole())
    except BaseException:
        answer.cancel()
        raise


class _Stream(StreamingResponse):
    """Server-sent events of an answer, which ends where its client goes, also before the first was sent."""

    def __init__(self, answer: Answer, responses: Responses, first: bytes) -> None:
        self.answer, self.responses, self.first = answer, responses, first
        # nginx would collect tokens into blocks otherwise.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(self._events(), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            # Starlette cancels the response where the client goes, and never tells the generator before its first step.
            await super().__call__(scope, receive, send)
        finally:
            self.answer.cancel()

    async def _events(self) -> AsyncIterator[bytes]:
        if self.first:
            yield self.first
        try:
            while pieces := await self.answer.next():
                events = self.responses.events(pieces)
                if events:
                    yield events
            yield self.responses.last_event()
        except ApiError as error:
            yield error_event(error.body())


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work, which is cancelled where the client goes. Raises: ApiError, then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        # nginx's number for it; nobody reads it but the log.
        raise ApiError(499, "the client has gone", "client_gone")
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _embeddings(body: EmbeddingRequest, vectors: list[list[float]], tokens: int) -> dict[str, Any]:
    def shown(vector: list[float]) -> Any:
        if body.encoding_format == "float":
            return vector
        # Little-endian float32, which OpenAI's Python client asks for unless it is told otherwise.
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

    data = [{"object": "embedding", "index": i, "embedding": shown(vector)} for i, vector in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    body = _BODIES.get(request.url.path)
    return _error_response(from_validation(error.errors(), list(body.model_fields) if body else []))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {404: "there is nothing at this path", 405: "this path doesn't take that method"}
    return _error_response(ApiError(error.status_code, texts.get(error.status_code, str(error.detail))))


async def _on_failure(request: Request, error: Exception) -> Response:
    # The traceback goes to the log; Starlette raises the error again behind this.
    message = f"the server failed ({type(error).__name__}); its log says why"
    return _error_response(ApiError(500, message, "internal", kind="server_error"))


def _error_response(error: ApiError) -> JSONResponse:
    headers = {"retry-after": str(max(1, math.ceil(error.retry_after)))} if error.retry_after is not None else {}
    if error.status in (408, 413):
        # The rest of the body would be read for as long as it is sent.
        headers["connection"] = "close"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


class Guard:
    """What every request passes first: its host, its key, a bound on its body; and it is counted and logged after."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self.app, self.gateway = app, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it with what is wrong."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        # Our own id, never the client's: it goes into the log, where a made-up one could forge lines.
        request_id, began = secrets.token_hex(8), time.monotonic()
        status = 500

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            state["tenant"] = self._admitted(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await _error_response(error)(scope, receive, send_on)
        else:
            await self.app(scope, _replayed(body, receive), send_on)
        finally:
            self._count(scope, status, time.monotonic() - began, request_id)

    def _admitted(self, scope: Scope) -> Tenant | None:
        """Whose request it is; None where the path is everybody's. Raises: ApiError."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self.gateway.keyring.path is None:
            # A page of another site must not reach this server through a name that it lets point here.
            host = headers.get(b"host", "").rpartition(":")
            name = host[0] if host[1] and host[2].isdigit() else "".join(host)
            if name.lower() not in _LOCAL_HOSTS:
                raise ApiError(403, "without keys, the server answers to localhost alone", "forbidden")
        if not scope["path"].startswith(("/v1/", "/metrics")):
            return None
        return self.gateway.keyring.tenant_of(headers.get(b"authorization"))

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The body. Raises: ApiError, for one that is too long or too slow."""
        most, parts, size = self.gateway.settings.max_body, [], 0
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        too_long = ApiError(413, f"the body may have {most:,} bytes", "body_too_long")
        # Before anything is read; a chunked body declares nothing and is counted as it comes.
        if declared.isdigit() and int(declared) > most:
            raise too_long
        try:
            async with asyncio.timeout(self.gateway.settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(499, "the client has gone", "client_gone")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_long
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, "the body came too slowly", "body_timeout") from None

    def _count(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        if not scope["path"].startswith("/v1/"):
            return
        state = scope["state"]
        tenant = state["tenant"].name if state.get("tenant") else ""
        # Known only behind the gateway's look-up: names that clients make up must not become series of their own.
        model = state.get("model", "")
        self.gateway.metrics.requests.labels(tenant, model, str(status)).inc()
        logger.info(
            "%s %s %s tenant=%s model=%s %.3f s %s",
            scope["method"], scope["path"][:100], status, tenant, model, seconds, request_id,
        )  # fmt: skip


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
