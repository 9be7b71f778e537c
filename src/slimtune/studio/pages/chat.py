"""A chat with a base and its adapters side by side. The page asks by /chat/answer, which passes the stream on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from slimtune.errors import SlimtuneError
from slimtune.studio.chat_server import ChatServer, find_bases, headers
from slimtune.studio.view import CurrentView, Page, View

PAGE = Page("chat", "/chat", order=50, of_run="/chat?adapter=")


class Question(BaseModel):
    """What one column asks.

    Attributes:
        adapter: a run of the folder; empty for the base alone.
        request: a body of /v1/chat/completions, without its model.
    """

    base: str
    adapter: str = ""
    request: dict[str, Any]


@PAGE.get("/chat")
def show(view: CurrentView, base: str | None = None, adapter: str | None = None) -> Response:
    """The chat with a base, by default that of the newest adapter."""
    bases = find_bases(view.studio.folder)
    if base is None:
        base = next((name for name, adapters in bases.adapters.items() if adapter in adapters), bases.first)
    adapters = bases.adapters.get(base, [])
    first = adapter if adapter in adapters else next(iter(adapters), "")
    columns = ["", first] if adapters else [""]
    known = {*bases.adapters, *map(str, bases.models), *bases.packaged}
    server = ChatServer(view.studio.folder)
    return view.render(
        "chat.html.j2",
        base=base,
        bases=bases,
        is_known=base in known,
        adapters=adapters,
        columns=columns,
        server=server.current,
        command_line=server.command(base) if base else "",
        short=lambda name: Path(name).name if Path(name).is_absolute() else name,
    )


@PAGE.get("/chat/server")
def show_server(view: CurrentView) -> Response:
    """Which model is loaded."""
    return _server(view)


@PAGE.post("/chat/server/stop")
def stop(view: CurrentView) -> Response:
    """Unload the model."""
    ChatServer(view.studio.folder).stop()
    return _server(view)


@PAGE.post("/chat/answer")
async def answer(view: CurrentView, question: Question) -> Response:
    """An answer as server-sent events: `state` while the model is loaded, then those of OpenAI's API."""
    if question.adapter:
        # Before a name becomes a path.
        view.studio.run_folder(question.adapter)
    # nginx would collect tokens into blocks otherwise.
    return StreamingResponse(
        _events(view, question), media_type="text/event-stream", headers={"x-accel-buffering": "no"}
    )


async def _events(view: View, question: Question) -> AsyncIterator[bytes]:
    server = ChatServer(view.studio.folder)
    if not server.is_ready(question.base):
        yield b"event: state\ndata: loading\n\n"
    try:
        current = await run_in_threadpool(server.wait_until_ready, question.base)
        model = await run_in_threadpool(server.model_name, question.adapter)
    except SlimtuneError as error:
        yield _error(str(error))
        return
    yield b"event: state\ndata: ready\n\n"
    body = question.request | {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    url = f"{current.url}/v1/chat/completions"
    try:
        async with (
            httpx.AsyncClient(headers=headers(current), trust_env=False, timeout=600) as client,
            client.stream("POST", url, json=body) as response,
        ):
            if response.is_error:
                await response.aread()
                yield _error(_sentence(response))
                return
            async for chunk in response.aiter_raw():
                yield chunk
                server.touch()
    except httpx.HTTPError:
        yield _error(view.t("chat.lost"))


def _sentence(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"


def _error(sentence: str) -> bytes:
    return b"data: " + json.dumps({"error": {"message": sentence}}, ensure_ascii=False).encode() + b"\n\n"


def _server(view: View) -> Response:
    return view.render("chat_server.html.j2", server=ChatServer(view.studio.folder).current)
