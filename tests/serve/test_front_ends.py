"""Programs that people have, asking a really started server: curl, and Simon Willison's `llm`.

python -m venv /tmp/llm && /tmp/llm/bin/pip install llm
SLIMTUNE_LLM=/tmp/llm/bin/llm pytest tests/serve/test_front_ends.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slimtune.serve.tenants import add_key
from small_server import Started, save_adapter, started

LLM = os.environ.get("SLIMTUNE_LLM") or shutil.which("llm")
BODY: dict[str, Any] = {
    "model": "one", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Started, str]]:
    root = tmp_path_factory.mktemp("front")
    save_adapter(root / "adapters" / "one", 1)
    key = add_key(root / "keys.yaml", "acme", {"adapters": ("one",)})
    with started(root / "adapters", root / "keys.yaml") as server:
        yield server, key


def expected(server: Started, key: str) -> str:
    return server.post("/v1/chat/completions", BODY, key).json()["choices"][0]["message"]["content"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(served: tuple[Started, str]) -> None:
    server, key = served

    def curl(path: str, *options: str) -> str:
        words = ["curl", "--silent", "--show-error", "--no-buffer", *options, server.url + path]
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout

    headers = ("--header", f"Authorization: Bearer {key}", "--header", "Content-Type: application/json")
    assert [model["id"] for model in json.loads(curl("/v1/models", *headers))["data"]] == ["base", "one"]
    lines = curl("/v1/chat/completions", *headers, "--data", json.dumps(BODY | {"stream": True})).split("\n\n")
    assert [lines[-2], lines[-1]] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == expected(server, key)
    assert json.loads(curl("/v1/models"))["error"]["code"] == "invalid_api_key"


@pytest.mark.skipif(LLM is None, reason="SLIMTUNE_LLM names no llm program")
def test_llm(served: tuple[Started, str], tmp_path: Path) -> None:
    server, key = served
    model = {"model_id": "ours", "model_name": "one", "api_base": f"{server.url}/v1", "api_key_name": "ours"}
    (tmp_path / "extra-openai-models.yaml").write_text(f"- {json.dumps(model)}\n")
    (tmp_path / "keys.json").write_text(json.dumps({"ours": key}))

    def llm(*words: str) -> str:
        command = [str(LLM), *words, "-o", "temperature", "0", "-o", "max_tokens", "12"]
        environment = os.environ | {"LLM_USER_PATH": str(tmp_path)}
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.removesuffix("\n")

    assert llm("-m", "ours", "hello") == llm("-m", "ours", "hello", "--no-stream") == expected(server, key)
    # The conversation goes on from what llm has kept of the answer.
    assert llm("-c", "and then?")
