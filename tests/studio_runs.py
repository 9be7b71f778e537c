"""Folders of runs with the tiny model, and a server of it that the studio finds on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimtune.engine.engine import Engine
from slimtune.serve.gateway import Gateway, GatewaySettings
from slimtune.serve.local import EngineBackend
from slimtune.serve.registry import Registry
from slimtune.serve.tenants import Keyring, add_key
from slimtune.studio.chat_server import ChatServer
from slimtune.studio.jobs import Process
from small_server import listening, save_adapter
from small_text_model import save_base, tiny_model, tiny_tokenizer


def save_runs(root: Path, *names: str) -> tuple[Path, Path]:
    """A base, and a folder of runs with adapters of it by these names."""
    base, runs = save_base(root / "tiny"), root / "runs"
    for seed, name in enumerate(names or ("orders", "주문"), 1):
        rename_base(save_adapter(runs / name, seed), str(base))
    return base, runs


def rename_base(adapter: Path, base: str, **fields: Any) -> None:
    """Have an adapter name this base."""
    path = adapter / "adapter_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values |= {"base_model_name_or_path": base, "task_type": "CAUSAL_LM"} | fields
    path.write_text(json.dumps(values), encoding="utf-8")


@contextmanager
def answering(runs: Path, base: Path) -> Iterator[ChatServer]:
    """A server in this process that stands on disk as one that an earlier studio started."""
    server = ChatServer(runs)
    server.folder.mkdir(parents=True, exist_ok=True)
    keys = server.folder / "keys.yaml"
    keys.unlink(missing_ok=True)
    key = add_key(keys, "studio", {"admin": True})
    backend = EngineBackend(Engine(tiny_model(), tiny_tokenizer(), slots=4))
    gateway = Gateway(backend, Registry(backend), Keyring(keys), GatewaySettings(adapters=runs))
    with listening(gateway) as url:
        process = Process.of(os.getpid())
        assert process is not None
        values = {"base": str(base), "key": key, "pid": process.pid, "began": process.began}
        (server.folder / "server.json").write_text(json.dumps(values), encoding="utf-8")
        (server.folder / "log").write_text(json.dumps({"url": url}) + "\n", encoding="utf-8")
        yield server
    (server.folder / "server.json").unlink(missing_ok=True)
