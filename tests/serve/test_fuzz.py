"""Bodies and headers of every kind: each gets an answer with a cause, none a 500, and the server goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimtune.serve import openai as schema
from small_server import Started, save_adapter, started

FIELDS = sorted({*schema.ChatCompletionRequest.model_fields, *schema.CompletionRequest.model_fields})
ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/load_lora_adapter"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["one", "base", "json_schema", "required", "user", "text", "function", "\x00", "é😀"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
CHAT = {"model": "one", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
COMPLETION = {"model": "one", "prompt": "x", "max_tokens": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    root: Path = tmp_path_factory.mktemp("fuzz")
    save_adapter(root / "one", 1)
    with started(root) as running:
        yield running
        assert running.post("/v1/completions", COMPLETION).status_code == 200
        assert running.gateway.queue.running == running.gateway.queue.waiting == 0


def check(answer: Any) -> None:
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
    elif answer.headers["content-type"] == "application/json":
        json.loads(answer.text)


@settings(max_examples=25)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3), is_chat=st.booleans())
def test_fields_of_every_kind(server: Started, changes: dict[str, Any], is_chat: bool) -> None:
    start, route = (CHAT, ROUTES[0]) if is_chat else (COMPLETION, ROUTES[1])
    # Long answers cost time and tell nothing more.
    check(server.post(route, start | changes | {"max_tokens": 2} | ({"n": 2} if "n" in changes else {})))


@settings(max_examples=20)
@given(body=st.dictionaries(st.text(max_size=8), VALUES, max_size=4) | VALUES, route=st.sampled_from(ROUTES))
def test_bodies_of_every_kind(server: Started, body: Any, route: str) -> None:
    check(server.post(route, body))


@settings(max_examples=20)
@given(schema_value=VALUES | st.fixed_dictionaries({"type": VALUES}, optional={"properties": VALUES, "enum": VALUES}))
def test_schemas_of_every_kind(server: Started, schema_value: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema_value}}
    check(server.post(ROUTES[0], CHAT | {"response_format": form}))


@settings(max_examples=30)
@given(data=st.binary(max_size=200), is_start=st.booleans())
def test_bytes_that_are_no_http(server: Started, data: bytes, is_start: bool) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\nx-odd: ".encode() if is_start else b""
        connection.sendall(head + data + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    # Nothing at all, where the connection ended in the middle of a request.
    assert not answer or answer.split()[1] in (b"400", b"403", b"404", b"405", b"200", b"499"), answer
