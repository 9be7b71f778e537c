"""The gateway before other servers: two really started ones of the tiny model, asked through their HTTP."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from slimtune import IA3Config, VeraConfig, get_peft_model
from slimtune.errors import AdapterFileError
from slimtune.serve.gateway import Gateway, GatewaySettings
from slimtune.serve.registry import Registry, folders_of
from slimtune.serve.remote import RemoteBackend, checked_for_vllm
from slimtune.serve.tenants import Keyring, add_key
from small_server import Started, listening, save_adapter, started, wait_until
from small_text_model import save_base, tiny_model

HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    for number, name in enumerate(("one", "two")):
        save_adapter(root / name, number)
    get_peft_model(tiny_model(), IA3Config(init_ia3_weights=False)).save_pretrained(root / "scaled")
    return root


@pytest.fixture(scope="module")
def behind(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Started, Started, str]]:
    """Two servers with a key, and that key."""
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    key = add_key(keys, "gateway", {"admin": True})
    with started(None, keys) as first, started(None, keys) as second:
        for server in (first, second):
            server.gateway.settings = GatewaySettings(adapters=adapters)
        yield first, second, key


@contextmanager
def in_front(urls: list[str], key: str | None, adapters: Path | None = None, **options: Any) -> Iterator[Started]:
    backend = RemoteBackend(urls, "base", 4, key, **options)
    registry = Registry(backend)
    for name, folder in folders_of(adapters).items() if adapters else ():
        registry.register(name, folder)
    gateway = Gateway(backend, registry, Keyring(None), GatewaySettings(adapters=adapters))
    with listening(gateway) as url:
        yield Started(gateway, url)


@pytest.fixture(scope="module")
def server(behind: tuple[Started, Started, str], adapters: Path) -> Iterator[Started]:
    first, second, key = behind
    with in_front([first.url, f"{second.url}/v1/"], key, adapters) as running:
        yield running


def say(server: Started, model: str, **options: Any) -> Any:
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 10, **options}
    return server.client().chat.completions.create(model=model, messages=HELLO, **settings)


@pytest.fixture(scope="module")
def direct(adapters: Path) -> Iterator[Started]:
    with started(adapters) as running:
        yield running


@pytest.mark.parametrize("model", ["base", "one", "two"])
def test_answers_pass_through_as_they_are(server: Started, direct: Started, model: str) -> None:
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
    answers = [say(which, model, **options) for which in (server, direct)]
    assert answers[0].choices == answers[1].choices
    assert answers[0].usage == answers[1].usage
    assert answers[0].model == ("base" if model == "base" else f"{model}@1")
    chunks = list(say(server, model, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answers[1].choices[0].message.content
    assert chunks[-1].usage == answers[1].usage


def test_completions_with_several_answers(server: Started, direct: Started) -> None:
    options: dict[str, Any] = {"model": "one", "prompt": ["a b", "c"], "max_tokens": 4, "temperature": 0, "logprobs": 1}
    answers = [which.client().completions.create(**options) for which in (server, direct)]
    by_index = [sorted(answer.choices, key=lambda choice: choice.index) for answer in answers]
    assert [choice.text for choice in by_index[0]] == [choice.text for choice in by_index[1]]
    # Each answer begins at its own turn: which tokens share a step, and so the order of sums, is not the same twice.
    logprobs: list[Any] = [choices[0].logprobs for choices in by_index]
    assert logprobs[0].token_logprobs == pytest.approx(logprobs[1].token_logprobs, abs=1e-5)


def test_tenants_share_nothing_that_a_server_behind_keeps_of_prompts(
    behind: tuple[Started, Started, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, key = behind
    tenants = [add_key(tmp_path / "keys.yaml", name, {}) for name in ("a", "b")]
    owners: list[str] = []
    engine: Any = first.gateway.backend.engine  # type: ignore[attr-defined]
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda request, on: owners.append(request.tenant) or submit(request, on))
    backend = RemoteBackend([first.url], "base", 4, key)
    gateway = Gateway(backend, Registry(backend), Keyring(tmp_path / "keys.yaml"), GatewaySettings())
    with listening(gateway) as url:
        server = Started(gateway, url)
        for tenant, salt in ((0, None), (0, None), (1, None), (0, "x"), (1, "x")):
            body = {"model": "base", "prompt": "hello", "max_tokens": 1, "temperature": 0, "cache_salt": salt}
            assert server.post("/v1/completions", body, tenants[tenant]).status_code == 200
    assert owners[0] == owners[1]
    assert len(set(owners)) == 4


def test_an_adapter_is_on_all_servers_and_goes_from_all(server: Started, behind: Any) -> None:
    def names(which: Started) -> list[str]:
        return [adapter.name for adapter in which.gateway.registry]

    say(server, "two")
    assert names(behind[0]) == names(behind[1])
    (remote,) = [name for name in names(behind[0]) if name.startswith("two-v1-")]
    load = {"lora_name": "two", "lora_path": "one"}
    assert server.post("/v1/load_lora_adapter", load).json()["root"] == "two@2"
    assert say(server, "two").choices == say(server, "one").choices
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "two@1"}).status_code == 200
    assert all(remote not in names(which) for which in behind[:2])
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "two@2"}).status_code == 200


def test_a_server_that_forgot_its_adapters_gets_them_again(server: Started, behind: Any) -> None:
    expected = say(server, "one").choices
    for which in behind[:2]:
        for adapter in list(which.gateway.registry):
            body = {"lora_name": adapter.versioned}
            assert which.post("/v1/unload_lora_adapter", body, behind[2]).status_code == 200
    assert say(server, "one").choices == expected


def test_requests_are_spread_and_a_server_that_is_down_is_passed_over(behind: Any) -> None:
    first, second, key = behind
    with socket.create_server(("127.0.0.1", 0)) as port:
        nobody = f"http://127.0.0.1:{port.getsockname()[1]}"
    with in_front([nobody, first.url, second.url], key) as server:
        before = [which.gateway.backend.stats().tokens_generated for which in (first, second)]
        threads = [threading.Thread(target=say, args=(server, "base"), kwargs={"max_tokens": 60}) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gained = [w.gateway.backend.stats().tokens_generated - b for w, b in zip(behind[:2], before, strict=True)]
        assert sum(gained) == 240
        assert min(gained) > 0
        assert server.get("/ready").status_code == 200
    with in_front([nobody], key) as server:
        with pytest.raises(openai.InternalServerError) as failed:
            say(server, "base")
        assert failed.value.status_code == 503
        assert server.get("/ready").status_code == 503


def test_who_leaves_is_noticed_behind_the_gateway(server: Started, behind: Any) -> None:
    stream = say(server, "base", max_tokens=450, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    wait_until(lambda: all(which.gateway.queue.running == 0 for which in behind[:2]))
    replicas = server.gateway.backend.replicas  # type: ignore[attr-defined]
    wait_until(lambda: all(replica.running == 0 for replica in replicas))


def test_mistakes_and_a_wrong_key_behind(server: Started, behind: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        say(server, "base", max_tokens=100_000)
    with in_front([behind[0].url], "sk-wrong") as other, pytest.raises(openai.InternalServerError) as failed:
        say(other, "base")
    assert failed.value.status_code == 502


def test_names_of_models_on_any_server(behind: Any) -> None:
    backend = RemoteBackend([behind[0].url], "base", 4, behind[2], loads=False)
    registry = Registry(backend)
    registry.register("mine", Path("base"), is_folder=False)
    gateway = Gateway(backend, registry, Keyring(None), GatewaySettings())
    with listening(gateway) as url:
        server = Started(gateway, url)
        assert say(server, "mine").choices == say(server, "base").choices
        assert say(server, "mine").model == "mine@1"


def test_what_vllm_does_not_take_is_refused_with_the_ways_out(server: Started, adapters: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"IA3 is not LoRA; serve it with --engine embedded, or merge it"):
        checked_for_vllm(adapters / "scaled")
    answer = server.post("/v1/load_lora_adapter", {"lora_name": "scaled-2", "lora_path": "scaled"})
    assert answer.status_code == 400
    assert "IA3" in answer.json()["error"]["message"]
    assert checked_for_vllm(adapters / "one")[:2] == ("LORA", 4)


def test_what_can_be_written_as_lora_is(behind: Any, adapters: Path, direct: Started) -> None:
    model = tiny_model()
    model.config.name_or_path = model.name_or_path = str(save_base(adapters.parent / "base"))
    adapted = get_peft_model(model, VeraConfig(r=8, target_modules=["q_proj"], init_weights=False))
    adapted.save_pretrained(adapters / "vera")
    load = {"lora_name": "vera", "lora_path": "vera"}
    expected = direct.post("/v1/load_lora_adapter", load).json()["root"]
    with in_front([behind[0].url], behind[2], adapters) as server:
        assert "--converted" in server.post("/v1/load_lora_adapter", load).json()["error"]["message"]
    with in_front([behind[0].url], behind[2], adapters, converted=adapters / "converted") as server:
        answers = [say(server, "vera"), say(direct, expected), say(server, "base")]
    texts = [answer.choices[0].message.content for answer in answers]
    assert texts[0] == texts[1] != texts[2]
    shutil.rmtree(adapters / "vera")


ODD: list[tuple[bytes, int]] = [
    (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: {not json}\n\n", 502),
    (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: [DONE]\n\n", 502),
    (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n", 502),
    (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": {"message": "out of memory"}}\n\n', 502),
    (b"HTTP/1.1 500 Oops\r\ncontent-length: 4\r\n\r\noops", 502),
    (b'HTTP/1.1 400 Bad\r\ncontent-length: 28\r\n\r\n{"error":{"message":"wrong"}}', 400),
    (b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n", 503),
    (b"nonsense\r\n\r\n", 503),
    (b"", 503),
]


@pytest.mark.parametrize(("said", "status"), ODD)
def test_a_server_that_says_odd_things(said: bytes, status: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as port:

        def answer() -> None:
            connection, _ = port.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(said)
                # Read to its end: closed with something unread, the connection would be reset before it is answered.
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

        threading.Thread(target=answer, daemon=True).start()
        with in_front([f"http://127.0.0.1:{port.getsockname()[1]}"], None) as server:
            response = server.post("/v1/chat/completions", {"model": "base", "messages": HELLO})
    assert response.status_code == status, response.text
    assert json.loads(response.text)["error"]["message"]
