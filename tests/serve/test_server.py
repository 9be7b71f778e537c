"""`slimtune serve` as a process: how it starts, refuses to start, and stops."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from slimtune.serve.tenants import add_key
from small_server import save_adapter, wait_until
from small_text_model import save_base

HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("process")
    save_base(root / "base")
    save_adapter(root / "adapters" / "one", 1)
    (root / "adapters" / "damaged").mkdir()
    (root / "adapters" / "damaged" / "adapter_config.json").write_text("{")
    return root / "base"


@contextmanager
def process(base: Any, *options: Any) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A server that has said its address."""
    command = [sys.executable, "-m", "slimtune", "serve", str(base), "--port", "0", "--json", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            line = running.stdout.readline()  # type: ignore[union-attr]
            assert line, running.stderr.read()  # type: ignore[union-attr]
            yield running, json.loads(line)
        finally:
            running.kill()


def test_a_server_ends_what_runs_and_refuses_what_is_new(base: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    key = add_key(keys, "acme", {"adapters": ("one",)})
    options = ["--adapters", base.parent / "adapters", "--keys", keys]
    with process(base, *options) as (running, told):
        assert told["adapters"] == ["one@1"], "the damaged one is left out"
        url = told["url"]
        second = add_key(keys, "late", {"admin": True})
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key=second).models.list()
        running.send_signal(signal.SIGHUP)

        def is_known() -> bool:
            headers = {"authorization": f"Bearer {second}"}
            return httpx.get(f"{url}/v1/models", headers=headers).status_code == 200

        wait_until(is_known)
        listed = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {second}"}).json()["data"]
        (damaged,) = [model for model in listed if model["id"] == "damaged"]
        assert damaged["state"] == "broken"
        assert "no safetensors weights" in damaged["error"]
        stream = client.chat.completions.create(
            model="one", messages=HELLO, max_tokens=480, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = [next(iter(stream))]
        running.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        with pytest.raises(openai.InternalServerError) as refused:
            client.chat.completions.create(model="base", messages=HELLO)
        assert (refused.value.status_code, refused.value.code) == (503, "stopping")
        assert refused.value.response.headers["retry-after"]
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        _, errors = running.communicate(timeout=60)
        assert running.returncode == 0, errors
        assert "'damaged' is not served" in errors
        assert "the keys were read again: 2 tenants" in errors
        assert re.search(r"POST /v1/chat/completions 200 tenant=acme model=one@1 [0-9.]+ s [0-9a-f]{16}", errors)
        assert "stopping: running answers end" in errors
        assert key not in errors
        assert "Traceback" not in errors


@pytest.mark.slow
def test_after_a_kill_it_starts_again_where_it_was(base: Path) -> None:
    with process(base, "--adapters", base.parent / "adapters") as (running, told):
        client = openai.OpenAI(base_url=f"{told['url']}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(
            model="one", messages=HELLO, max_tokens=480, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        running.kill()
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            list(stream)
    port = told["url"].rpartition(":")[2]
    with process(base, "--adapters", base.parent / "adapters", "--port", port) as (_, again):
        assert again == told
        # Not over the connection that has broken.
        client = openai.OpenAI(base_url=f"{told['url']}/v1", api_key="none", max_retries=0)
        assert client.chat.completions.create(model="one", messages=HELLO, max_tokens=4).choices


@pytest.mark.soak
def test_a_short_patience_breaks_answers_off(base: Path) -> None:
    with process(base, "--drain-timeout", 0.2) as (running, told):
        client = openai.OpenAI(base_url=f"{told['url']}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(
            model="base", messages=HELLO, max_tokens=480, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        failures: list[BaseException] = []

        def read() -> None:
            try:
                list(stream)
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
        thread.join()
        # On a fast machine all 480 tokens may have come in time.
        assert (running.returncode, bool(failures)) in ((1, True), (0, False)), errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "--keys"),
        (["--host", "::"], "--keys"),
        (["--host", "example.org"], "--keys"),
        (["--keys", "nowhere.yaml"], "nowhere.yaml"),
        (["--adapters", "nowhere"], "nowhere"),
        (["--adapter", "base=nowhere"], "nowhere"),
        (["--context", "100000"], "positions"),
        (["--log-level", "loud"], "--log-level"),
        (["--url", "http://127.0.0.1:1"], "--engine vllm or openai"),
        (["--engine", "openai"], "needs --url"),
        (["--engine", "vllm", "--vllm", "nowhere"], "no program 'nowhere'"),
    ],
)
def test_what_keeps_a_server_from_starting(base: Path, run: Any, options: list[str], said: str) -> None:
    result = run("serve", base, "--port", 0, *options)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def run() -> Any:
    from typer.testing import CliRunner

    from slimtune.cli import app

    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_an_address_that_is_taken(base: Path, run: Any) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("serve", base, "--port", taken.getsockname()[1])
    assert result.exit_code == 2
    assert "pass another --port" in result.stderr


def test_a_key_is_printed_once(run: Any, tmp_path: Path) -> None:
    from slimtune.serve.tenants import Keyring

    file = tmp_path / "deep" / "keys.yaml"
    result = run("serve-key", file, "acme", "--adapter", "a*", "--concurrency", 3, "--json")
    told = json.loads(result.stdout)
    tenant = Keyring(file).tenant_of(f"Bearer {told['key']}")
    assert (tenant.name, tenant.adapters, tenant.concurrency) == ("acme", ("a*",), 3)
    assert run("serve-key", file, "acme").stdout.strip() not in file.read_text()
    refused = run("serve-key", file, "acme", "--concurrency", 0)
    assert refused.exit_code == 2
    assert "concurrency" in refused.stderr
