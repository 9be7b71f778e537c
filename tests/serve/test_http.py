"""The real `openai` client and raw requests against a really started server of a tiny model and its adapters."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from slimtune import PeftModel
from slimtune.serve.openai import ChatCompletionRequest, CompletionRequest
from slimtune.serve.tenants import add_key
from small_server import Started, save_adapter, started, wait_until
from small_text_model import tiny_model, tiny_tokenizer

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    for number, name in enumerate(("one", "two", "acme-x")):
        save_adapter(root / name, number)
    return root


@pytest.fixture(scope="module")
def server(adapters: Path) -> Iterator[Started]:
    with started(adapters) as running:
        yield running


def alone(adapter: Path | None, tokens: int = 12) -> str:
    """What the model says by itself, through `generate` of transformers."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    ids = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def ask(server: Started, model: str = "one", key: str = "none", **options: Any) -> Any:
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 12, **options}
    return server.client(key).chat.completions.create(model=model, messages=HELLO, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["base", "one", "two"])
def test_a_model_answers_as_by_itself(server: Started, adapters: Path, name: str) -> None:
    expected = alone(None if name == "base" else adapters / name)
    answer = ask(server, name)
    assert answer.choices[0].message.content == expected
    assert answer.model == ("base" if name == "base" else f"{name}@1")
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_an_answer_can_be_sent_back_as_it_came(server: Started) -> None:
    answer = ask(server).choices[0].message
    messages: list[Any] = [*HELLO, answer, {"role": "user", "content": "and then?"}]
    spelled = [*HELLO, {"role": "assistant", "content": answer.content}, messages[-1]]
    texts = [
        server.client().chat.completions.create(model="one", messages=each, temperature=0, max_tokens=8)
        for each in (messages, spelled)
    ]
    assert texts[0].choices == texts[1].choices
    assert texts[0].usage == texts[1].usage


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_null_and_what_asks_for_nothing_are_as_if_left_out(server: Started, path: str) -> None:
    body_of = ChatCompletionRequest if "chat" in path else CompletionRequest
    asked: dict[str, Any] = {"model": "one", "temperature": 0, "max_tokens": 4}
    asked |= {"messages": HELLO} if "chat" in path else {"prompt": "hello"}
    plain = server.post(path, asked).json()["choices"]
    nothing = dict.fromkeys({*body_of.model_fields, *body_of.idle} - asked.keys())
    assert server.post(path, nothing | asked).json()["choices"] == plain
    for name, values in body_of.idle.items():
        for value in values:
            assert server.post(path, {**asked, name: value}).json()["choices"] == plain
        assert server.post(path, {**asked, name: "something"}).json()["error"]["code"] == "unknown_field"


def test_many_answers_of_one_request_leave_room_for_others(adapters: Path, tmp_path: Path) -> None:
    keys = {
        name: add_key(tmp_path / "keys.yaml", name, {"concurrency": most})
        for name, most in (("many", None), ("bound", 1), ("other", None))
    }
    with started(adapters, tmp_path / "keys.yaml") as server:
        body = {"model": "base", "prompt": "hello", "max_tokens": 120, "temperature": 1, "ignore_eos": True}
        ended: list[tuple[str, Any]] = []

        def run(name: str, **options: Any) -> None:
            ended.append((name, server.post("/v1/completions", body | options, keys[name]).json()))

        for name in ("bound", "many"):
            ended.clear()
            big = threading.Thread(target=run, args=(name,), kwargs={"n": 24})
            big.start()
            wait_until(lambda: server.gateway.queue.running > 0)
            most = 0
            while not any(who == "other" for who, _ in ended) and big.is_alive():
                most = max(most, server.gateway.queue.running)
                run("other", max_tokens=5)
            big.join()
            assert [who for who, _ in ended] == ["other", name], "it waits for a turn and not for a request"
            assert most <= (1 if name == "bound" else 4)
            choices = ended[-1][1]["choices"]
            assert sorted(choice["index"] for choice in choices) == [*range(24)]
            assert {choice["finish_reason"] for choice in choices} == {"length"}
            assert ended[-1][1]["usage"]["completion_tokens"] == 24 * 120
            wait_until(lambda: server.gateway.queue.running == 0)


def test_a_salt_parts_what_is_kept_of_prompts(server: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, owners = server.gateway.backend.engine, []  # type: ignore[attr-defined]
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda request, on: owners.append(request.tenant) or submit(request, on))
    for salt in ("a", "a", "b", None, None):
        body = {"model": "one", "prompt": "hello", "max_tokens": 1, "temperature": 0, "cache_salt": salt}
        assert server.post("/v1/completions", body).status_code == 200
    # What the engine parts by tenant (tests/engine) it parts by salt as well.
    first, again, other, bare, bare_again = owners
    assert first == again
    assert bare == bare_again
    assert len({first, other, bare}) == 3


def test_a_stream_holds_the_same_text(server: Started, adapters: Path) -> None:
    chunks = list(ask(server, "two", stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == alone(adapters / "two")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 12)
    assert len({c.id for c in chunks}) == 1


def test_many_at_once_each_by_its_own_adapter(server: Started, adapters: Path) -> None:
    names = ["base", "one", "two", "acme-x"] * 3
    answers: dict[int, str] = {}

    def run(index: int) -> None:
        answers[index] = ask(server, names[index]).choices[0].message.content

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {name: alone(None if name == "base" else adapters / name) for name in set(names)}
    assert answers == {index: expected[name] for index, name in enumerate(names)}


def test_completions_of_texts_and_of_ids(server: Started) -> None:
    client, tokenizer = server.client(), tiny_tokenizer()
    options: dict[str, Any] = {"model": "one", "max_tokens": 5, "temperature": 0}
    texts = [choice.text for choice in client.completions.create(prompt=["two lattes", "hello"], **options).choices]
    ids = [tokenizer(text)["input_ids"] for text in ("two lattes", "hello")]
    assert [choice.text for choice in client.completions.create(prompt=ids, **options).choices] == texts
    assert client.completions.create(prompt=ids[1], **options).choices[0].text == texts[1]
    streamed = ["", ""]
    for chunk in client.completions.create(prompt=["two lattes", "hello"], stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_draws_repeat_by_seed_and_differ_between_answers(server: Started) -> None:
    def drawn(seed: int) -> list[str]:
        return [c.message.content for c in ask(server, temperature=1.5, seed=seed, n=3).choices]

    first = drawn(7)
    assert first == drawn(7)
    assert first != drawn(8)
    assert len(set(first)) == 3


def test_log_probabilities(server: Started) -> None:
    logprobs = ask(server, logprobs=True, top_logprobs=3, max_tokens=4).choices[0].logprobs.content
    assert len(logprobs) == 4
    for entry in logprobs:
        assert entry.logprob == max(other.logprob for other in entry.top_logprobs)
        assert len(entry.top_logprobs) == 3
    names = ("tokens", "token_logprobs", "top_logprobs")
    legacy = server.client().completions.create(model="one", prompt="hi", max_tokens=4, temperature=0, logprobs=2)
    for token, logprob, top in zip(*(getattr(legacy.choices[0].logprobs, name) for name in names), strict=True):
        assert top[token] == logprob == max(top.values())
    assert legacy.choices[0].logprobs.text_offset[0] == 0


def test_a_stop_string_is_no_part_of_the_answer(server: Started, adapters: Path) -> None:
    whole = alone(adapters / "two")
    stop = whole[4:6]
    answer = ask(server, "two", stop=[stop, "never said"])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_json_by_a_schema(server: Started) -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["small", "large"]}, "count": {"type": "integer", "maximum": 99}},
        "required": ["size", "count"],
        "additionalProperties": False,
    }
    for model in ("base", "one"):
        form = {"type": "json_schema", "json_schema": {"name": "order", "schema": schema, "strict": True}}
        answer = ask(server, model, temperature=1, seed=1, max_tokens=200, response_format=form).choices[0]
        assert answer.finish_reason == "stop"
        value = json.loads(answer.message.content)
        assert value["size"] in ("small", "large")
        assert value["count"] <= 99
    assert ask(server, max_tokens=5, response_format={"type": "json_object"}).choices[0].message.content[0] == "{"


def test_a_schema_that_can_not_be_followed_is_the_clients_mistake(server: Started) -> None:
    for schema in ({"type": "nonsense"}, {"$ref": "#/nowhere"}):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        with pytest.raises(openai.BadRequestError, match="schema"):
            ask(server, response_format=form)


def test_models_are_listed_with_what_answers(server: Started) -> None:
    models = {model.id: model for model in server.client().models.list()}
    assert list(models) == ["base", "acme-x", "one", "two"]
    assert models["one"].root == "one@1"  # type: ignore[attr-defined]
    assert models["one"].method == "LORA"  # type: ignore[attr-defined]
    assert server.client().models.retrieve("one@1").id == "one"
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("nobody")


@pytest.mark.parametrize(
    ("body", "status", "code", "said"),
    [
        ({"model": "oen"}, 404, "model_not_found", "did you mean 'one'"),
        ({"temprature": 1}, 400, "unknown_field", "did you mean 'temperature'"),
        ({"logit_bias": {"5": 1}}, 400, "unknown_field", "logit_bias"),
        ({"store": True}, 400, "unknown_field", "store"),
        ({"temprature": None}, 400, "unknown_field", "did you mean 'temperature'"),
        ({"messages": None}, 400, None, "messages"),
        ({"messages": [{"role": "user", "content": "", "refusal": "no"}]}, 400, None, "assistant"),
        ({"messages": [{"role": "user", "content": "word " * 100_000}]}, 400, "context_length_exceeded", "or more"),
        ({"model": "x" * 1_000_000}, 404, "model_not_found", "does not exist"),
        ({"repetition_penalty": 1e-300}, 400, None, "repetition_penalty"),
        ({"temperature": 3}, 400, None, "temperature"),
        ({"max_tokens": 0}, 400, None, "max_tokens"),
        ({"max_tokens": 100_000}, 400, "context_length_exceeded", "context"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, 400, "context_length_exceeded", "context"),
        ({"messages": []}, 400, None, "messages"),
        ({"messages": [{"role": "king", "content": ""}]}, 400, None, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, 400, None, "content is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, "content"),
        ({"messages": "hello"}, 400, None, "messages"),
        ({"n": 0}, 400, None, "n"),
        ({"n": 2, "temperature": 0}, 400, None, "temperature 0"),
        ({"stop": [""]}, 400, None, "stop"),
        ({"stream_options": {}}, 400, None, "stream=true"),
        ({"top_logprobs": 1}, 400, None, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, None, "template"),
        ({"tool_choice": "required"}, 400, None, "tools"),
        ({"seed": 2**70}, 400, None, "seed"),
    ],
)
def test_mistakes_are_told_in_openais_form(
    server: Started, body: dict[str, Any], status: int, code: str | None, said: str
) -> None:
    answer = server.post("/v1/chat/completions", {"model": "one", "messages": HELLO, **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert said in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"null", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'"text"', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"model": NaN}', "application/json", 400),
        (b'{"model": "one", "messages": [{"role": "user", "content": "\\ud800"}]}', "application/json", 400),
        (b"1" * 5000, "application/json", 400),
        (b'{"model": "one", "messages": []}', "text/plain", 400),
        (b"x" * 5_000_000, "application/json", 413),
    ],
)
def test_bodies_that_are_none(server: Started, content: bytes, kind: str, status: int) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers={"content-type": kind})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_a_body_without_an_end_is_cut_off(server: Started) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        with pytest.raises((ConnectionError, TimeoutError)):
            connection.sendall((b"10000\r\n" + b" " * 0x10000 + b"\r\n") * 1000)


def test_paths_methods_and_hosts(server: Started) -> None:
    assert server.get("/v1/nothing").status_code == 404
    assert server.get("/v1/completions").status_code == 405
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ready"}
    foreign = httpx.get(f"{server.url}/v1/models", headers={"host": "evil.example"})
    assert foreign.status_code == 403, "another site's page must not reach a server without keys"
    assert "<title>slimtune</title>" in server.get("/").text
    assert server.get("/").headers["content-security-policy"].startswith("default-src 'none'")


def is_idle(server: Started) -> bool:
    stats: Any = server.gateway.backend.stats()
    return stats.running == stats.waiting == 0 == server.gateway.queue.running


@pytest.mark.parametrize("streamed", [True, False])
def test_who_leaves_frees_the_slot(server: Started, streamed: bool) -> None:
    wait_until(lambda: is_idle(server))
    body = json.dumps(
        {"model": "one", "messages": HELLO, "max_tokens": 400, "ignore_eos": True, "stream": streamed}
    ).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: server.gateway.backend.stats().running == 1)  # type: ignore[union-attr]
    before = server.gateway.backend.stats().tokens_generated  # type: ignore[union-attr]
    wait_until(lambda: is_idle(server))
    assert server.gateway.backend.stats().tokens_generated - before < 390  # type: ignore[union-attr]
    assert not server.gateway.registry.find("one").users  # type: ignore[union-attr]


def test_metrics_count_what_was_answered(server: Started) -> None:
    def value(name: str) -> float:
        lines = server.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name) and line[0] != "#")

    before, requests = value('slimtune_tokens_total{kind="generated"'), value("slimtune_requests_total")
    ask(server, "two", max_tokens=7)
    server.post("/v1/chat/completions", {"model": "made-up-name", "messages": HELLO})
    assert value('slimtune_tokens_total{kind="generated"') == before + 7
    assert value("slimtune_requests_total") == requests + 2
    assert "made-up-name" not in server.get("/metrics").text
    assert value("slimtune_engine_free_slots") == 4


@pytest.fixture(scope="module")
def tenants(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Started, dict[str, str]]]:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys = {
        "acme": add_key(file, "acme", {"adapters": ("acme-*",), "base": False}),
        "other": add_key(file, "other", {"adapters": ("one",)}),
        "few": add_key(file, "few", {"requests_per_minute": 1}),
        "root": add_key(file, "root", {"admin": True}),
    }
    with started(adapters, file) as running:
        yield running, keys


def test_a_key_sees_its_own_models_alone(tenants: tuple[Started, dict[str, str]]) -> None:
    server, keys = tenants
    seen = {name: [m["id"] for m in server.get("/v1/models", key).json()["data"]] for name, key in keys.items()}
    assert seen == {
        "acme": ["acme-x"],
        "other": ["base", "one"],
        "few": ["base"],
        "root": ["base", "acme-x", "one", "two"],
    }
    assert not any("path" in m for m in server.get("/v1/models", keys["acme"]).json()["data"])


def test_others_adapters_are_as_unknown_as_none(tenants: tuple[Started, dict[str, str]]) -> None:
    server, keys = tenants

    def told(model: str) -> tuple[int, str]:
        answer = server.post("/v1/chat/completions", {"model": model, "messages": HELLO}, keys["acme"])
        return answer.status_code, answer.text.replace(model, "NAME")

    assert told("one") == told("two@1") == told("base") == told("no-such-thing")
    assert told("one")[0] == 404
    assert server.get("/v1/models/one", keys["acme"]).status_code == 404
    assert ask(server, "acme-x", keys["acme"]).choices[0].message.content


def test_without_a_key_nothing_is_told(tenants: tuple[Started, dict[str, str]]) -> None:
    server, keys = tenants
    for path in ("/v1/models", "/v1/models/one", "/metrics"):
        assert server.get(path).status_code == server.get(path, "sk-wrong").status_code == 401
    # The key comes first: whether a body is well-formed, or a path exists, is nobody's business.
    assert server.post("/v1/chat/completions", {"nonsense": 1}).status_code == 401
    assert server.get("/v1/nothing").status_code == 401
    assert server.get("/health").status_code == server.get("/ready").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        ask(server, key="sk-wrong")
    assert server.get("/metrics", keys["acme"]).status_code == 403
    assert server.get("/metrics", keys["root"]).status_code == 200


def test_a_limit_is_told_with_when_to_come_back(tenants: tuple[Started, dict[str, str]]) -> None:
    server, keys = tenants
    ask(server, "base", keys["few"])
    answer = server.post("/v1/chat/completions", {"model": "base", "messages": HELLO}, keys["few"])
    assert answer.status_code == 429
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.json()["error"]["type"] == "rate_limit_error"
    ask(server, "one", keys["other"])


def test_only_an_admin_loads_and_unloads(tenants: tuple[Started, dict[str, str]], adapters: Path) -> None:
    server, keys = tenants
    for path, body in (("load", {"lora_name": "x", "lora_path": "one"}), ("unload", {"lora_name": "one"})):
        assert server.post(f"/v1/{path}_lora_adapter", body, keys["other"]).status_code == 403
    answer = server.post("/v1/load_lora_adapter", {"lora_name": "acme-new", "lora_path": "two"}, keys["root"])
    assert answer.json() == {"id": "acme-new", "root": "acme-new@1", "state": "loaded"}
    assert ask(server, "acme-new", keys["acme"]).choices[0].message.content == alone(adapters / "two")
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "acme-new"}, keys["root"]).status_code == 200
    with pytest.raises(openai.NotFoundError):
        ask(server, "acme-new", keys["acme"])
