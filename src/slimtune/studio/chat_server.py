"""What answers in the chat: `slimtune serve` with one base and the adapters of the folder, a process of its own.

    FOLDER/.studio/chat/server.json   its process, its base and the key that it lets in; the owner's alone to read
    FOLDER/.studio/chat/keys.yaml     the hash of the key
    FOLDER/.studio/chat/log           what it prints, its address on a line of JSON
    FOLDER/.studio/chat/used          written whenever it answers

A keeper (`python -m slimtune.studio.chat_server FOLDER PID BEGAN`) stops it when nobody has asked it anything for a
while, whether the studio still runs or not. A studio that starts finds it and goes on asking it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from slimtune.errors import ConfigError, SlimtuneError, TrainingError
from slimtune.serve.tenants import BASE, add_key
from slimtune.storage.atomic import write_file
from slimtune.storage.source import ADAPTER, PACKAGED, base_of
from slimtune.storage.text_files import read_json
from slimtune.studio.history import RUN_SUFFIX
from slimtune.studio.jobs import OWN_FOLDER, Process, interrupt, spawn

IDLE_SECONDS = 15 * 60
_SERVER, _KEYS, _LOG, _USED = "server.json", "keys.yaml", "log", "used"
_TENANT = "studio"
_LOOK_SECONDS, _STOP_SECONDS = 0.2, 10.0
_starting = threading.Lock()
"""Two columns that are asked at once need one server, and one copy of an adapter."""

ServerState = Literal["stopped", "loading", "ready", "failed"]


@dataclass(frozen=True)
class ServerProcess:
    """A server that was started, whether it still runs or not.

    Attributes:
        key: of OpenAI's API, which nobody else has.
        url: None until its model is loaded.
        words: why it ended, as it printed it.
    """

    base: str
    process: Process
    key: str
    url: str | None
    words: str

    @property
    def state(self) -> ServerState:
        """How far it is."""
        if not self.process.is_alive:
            return "failed"
        return "ready" if self.url else "loading"


class ChatServer:
    """The one server of a folder of runs."""

    def __init__(self, runs: Path) -> None:
        self.runs, self.folder = runs, runs / OWN_FOLDER / "chat"

    @property
    def current(self) -> ServerProcess | None:
        """The server that was started last, unless it was stopped."""
        try:
            values = read_json(self.folder / _SERVER)
            process = Process(int(values["pid"]), float(values["began"]))
            url, words = _printed(self.folder / _LOG)
            return ServerProcess(str(values["base"]), process, str(values["key"]), url, words)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def state(self) -> ServerState:
        """How far it is."""
        current = self.current
        return "stopped" if current is None else current.state

    def arguments(self, base: str) -> list[str]:
        """What is behind `slimtune` to start it. Behind `--`, no name of a base is taken for an option."""
        keys = str(self.folder / _KEYS)
        options = ["--adapters", str(self.runs), "--keys", keys, "--port", "0", "--drain-timeout", "2", "--json"]
        return ["serve", *options, "--", base]

    def command(self, base: str) -> str:
        """What a user would type."""
        return shlex.join(["slimtune", *self.arguments(base)])

    def is_ready(self, base: str) -> bool:
        """Whether it can answer with this base now."""
        current = self.current
        return current is not None and current.base == base and current.state == "ready"

    def wait_until_ready(self, base: str) -> ServerProcess:
        """The server of a base, started in place of any other one. Raises: TrainingError, with why it didn't start."""
        with _starting:
            current = self.current
            if current is None or current.base != base or current.state == "failed":
                self._stop()
                self._start(base)
        while True:
            current = self.current
            if current is None or current.base != base:
                raise TrainingError("the model was unloaded before it was ready")
            if current.state == "ready":
                self.touch()
                return current
            if current.state == "failed":
                raise TrainingError(current.words or f"the server of {base} ended without a word")
            time.sleep(_LOOK_SECONDS)

    def model_name(self, adapter: str) -> str:
        """The field "model" for an adapter, which is loaded if the server doesn't have it as it is now; "" is the base.

        Raises: ConfigError, for an adapter that the server doesn't take.
        """
        if not adapter:
            return BASE
        current = self.current
        if current is None or current.url is None:
            raise ConfigError("no model is loaded")
        name = _name_for(adapter)
        with _starting, client(current) as http:
            entries = http.get("/v1/models").raise_for_status().json()["data"]
            written = max(path.stat().st_mtime for path in (self.runs / adapter).glob("adapter_*"))
            if any(entry["id"] == name and entry["created"] >= int(written) for entry in entries):
                return name
            answer = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": adapter})
            if answer.is_error:
                raise ConfigError(answer.json()["error"]["message"])
        return name

    def answer(self, base: str, adapter: str, request: Mapping[str, Any]) -> str:
        """The whole answer to a body of /v1/chat/completions. Raises: ConfigError, TrainingError."""
        current = self.wait_until_ready(base)
        body = {**request, "model": self.model_name(adapter)}
        with client(current) as http:
            answer = http.post("/v1/chat/completions", json=body)
            if answer.is_error:
                raise ConfigError(answer.json()["error"]["message"])
            self.touch()
            return answer.json()["choices"][0]["message"]["content"] or ""

    def touch(self) -> None:
        """Say that it is used."""
        with suppress(OSError):
            (self.folder / _USED).touch()

    def stop(self) -> None:
        """End it, if it runs, and wait for that."""
        with _starting:
            self._stop()

    def _start(self, base: str) -> None:
        if not base.strip():
            raise ConfigError("no base model is named; choose one")
        self.folder.mkdir(parents=True, exist_ok=True)
        # The key in it is as good as the model.
        self.folder.chmod(0o700)
        (self.folder / _KEYS).unlink(missing_ok=True)
        key = add_key(self.folder / _KEYS, _TENANT, {"admin": True})
        with (self.folder / _LOG).open("wb") as log:
            child = spawn("slimtune", self.arguments(base), Path.cwd(), log)
        process = Process.of(child.pid) or Process(child.pid, time.time())
        self.touch()
        values = {"base": base, "key": key, "pid": process.pid, "began": process.began}
        write_file(self.folder / _SERVER, json.dumps(values))
        keeper = [str(self.runs), str(process.pid), str(process.began)]
        spawn("slimtune.studio.chat_server", keeper, self.runs)

    def _stop(self) -> None:
        current = self.current
        (self.folder / _SERVER).unlink(missing_ok=True)
        if current is None:
            return
        interrupt(current.process)
        end = time.monotonic() + _STOP_SECONDS
        while current.process.is_alive and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)
        if current.process.is_alive:
            # It may be reading the weights of a large model, which nothing interrupts.
            with suppress(ProcessLookupError):
                os.kill(current.process.pid, signal.SIGKILL)


@contextmanager
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    """A client of a server. Raises: ConfigError, where it doesn't answer."""
    assert server.url is not None, "it isn't ready"
    try:
        # Without trust in the environment: a proxy must not see what this machine says to itself.
        with httpx.Client(base_url=server.url, headers=headers(server), trust_env=False, timeout=600) as opened:
            yield opened
    except httpx.HTTPError as error:
        raise ConfigError(f"the server of {server.base} doesn't answer: {error}; stop it, and try again") from error


def headers(server: ServerProcess) -> dict[str, str]:
    """With its key."""
    return {"authorization": f"Bearer {server.key}"}


@dataclass(frozen=True)
class Bases:
    """What can be asked.

    Attributes:
        adapters: of the folder of runs, the newest first, by the base that each names.
        models: the folders of whole models among the runs.
        packaged: models that come with an installed package.
        faults: adapters that can't be asked, with why.
    """

    adapters: Mapping[str, list[str]]
    models: list[Path]
    packaged: list[str]
    faults: list[str]

    @property
    def first(self) -> str:
        """The one to begin with: that of the newest adapter."""
        return next(iter([*self.adapters, *map(str, self.models), *self.packaged]), "")


def find_bases(runs: Path) -> Bases:
    """The bases of a folder of runs and their adapters; each adapter's own file says which base it has."""
    by_base: dict[str, list[str]] = {}
    models, faults = [], []
    for path in sorted(_folders(runs), key=lambda path: path.stat().st_mtime, reverse=True):
        if (path / ADAPTER).is_file():
            try:
                base, task = base_of(path), read_json(path / ADAPTER).get("task_type")
            except SlimtuneError as error:
                faults.append(f"{path.name}: {error}")
                continue
            if task in (None, "CAUSAL_LM"):
                by_base.setdefault(base, []).append(path.name)
        elif (path / "config.json").is_file():
            models.append(path)
    return Bases(by_base, models, _installed(), faults)


def _folders(runs: Path) -> Iterator[Path]:
    for path in runs.iterdir():
        if path.is_dir() and not path.is_symlink() and not path.name.startswith(".") and path.suffix != RUN_SUFFIX:
            yield path


def _installed() -> list[str]:
    """Packaged models that are here and write text."""
    from importlib.metadata import PackageNotFoundError, distribution

    names = []
    for name, packaged in PACKAGED.items():
        with suppress(PackageNotFoundError):
            distribution(packaged.distribution)
            names += [name] if not packaged.hub.startswith("sentence-transformers/") else []
    return names


def _name_for(adapter: str) -> str:
    """A name that the server takes: the run's own, unless it has characters that names of models can't have."""
    from slimtune.serve.registry import NAME

    if NAME.fullmatch(adapter) and adapter != BASE:
        return adapter
    return "run-" + hashlib.sha256(adapter.encode()).hexdigest()[:16]


def _printed(log: Path) -> tuple[str | None, str]:
    """The address that a server printed, and the last sentence."""
    url, words = None, ""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("{"):
            with suppress(ValueError):
                values: Any = json.loads(line)
                url = values.get("url", url)
        elif line.strip():
            words = line.strip().removeprefix("slimtune: ")
    return url, words


def keep(runs: Path, process: Process, idle_seconds: float = IDLE_SECONDS) -> None:
    """Wait for the end of a server; stop it once it was idle for too long, or another one took its place."""
    server = ChatServer(runs)
    while process.is_alive:
        current = server.current
        if current is None or current.process.pid != process.pid:
            interrupt(process)
        elif time.time() - _changed(server.folder / _USED) > idle_seconds:
            server.stop()
        time.sleep(5 * _LOOK_SECONDS)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


if __name__ == "__main__":
    keep(Path(sys.argv[1]), Process(int(sys.argv[2]), float(sys.argv[3])))
