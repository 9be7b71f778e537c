"""A really started server: uvicorn on a port of its own, in a thread of the test's process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
import uvicorn

from slimtune import LoraConfig, get_peft_model
from slimtune.engine.engine import Engine
from slimtune.serve.gateway import Gateway, GatewaySettings
from slimtune.serve.http import create_app
from slimtune.serve.local import EngineBackend
from slimtune.serve.registry import Registry, folders_of
from slimtune.serve.tenants import Keyring
from small_text_model import tiny_model, tiny_tokenizer


def save_adapter(folder: Path, seed: int, rank: int = 4, **model: Any) -> Path:
    """A LoRA that answers otherwise than the base."""
    adapted = get_peft_model(tiny_model(**model), LoraConfig(r=rank, init_lora_weights=False))
    for index, (name, parameter) in enumerate(sorted(adapted.named_parameters())):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed * 1000 + index))
    adapted.save_pretrained(folder)
    return folder


class Started:
    """A gateway that listens."""

    def __init__(self, gateway: Gateway, url: str) -> None:
        self.gateway, self.url = gateway, url

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, body: Any = None, key: str | None = None, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.post(self.url + path, json=body, headers=headers, timeout=60, **options)

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        return httpx.get(self.url + path, headers={"authorization": f"Bearer {key}"} if key else {}, timeout=60)


@contextmanager
def started(
    adapters: Path | None = None,
    keys: Path | None = None,
    template: str | None = None,
    memory: int | None = None,
    slots: int = 4,
    patience: float = 60.0,
    **settings: Any,
) -> Iterator[Started]:
    """A server of the tiny model and the adapters in a folder."""
    tokenizer = tiny_tokenizer(template) if template else tiny_tokenizer()
    backend = EngineBackend(Engine(tiny_model(), tokenizer, slots=slots))
    registry = Registry(backend, memory, patience=patience)
    for name, folder in folders_of(adapters).items() if adapters else ():
        registry.register(name, folder)
    gateway = Gateway(backend, registry, Keyring(keys), GatewaySettings(adapters=adapters, **settings))
    with listening(gateway) as url:
        yield Started(gateway, url)


@contextmanager
def listening(gateway: Gateway) -> Iterator[str]:
    """The address of a gateway behind uvicorn."""
    from contextlib import asynccontextmanager

    app = create_app(gateway)

    @asynccontextmanager
    async def lifespan(app: Any) -> Any:
        await gateway.backend.start()
        yield
        await gateway.backend.stop()

    app.router.lifespan_context = lifespan
    with socket.create_server(("127.0.0.1", 0)) as port:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, args=([port],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def wait_until(holds: Any, seconds: float = 30) -> None:
    """Wait for what happens on another thread; fails where it doesn't."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
