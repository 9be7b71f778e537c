"""Half an hour of arrivals, cancellations, loads, unloads, bad requests, slow and vanishing clients.

SOAK_SECONDS shortens it. No row may be wrong, no request lost, and nothing may be left behind.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from slimtune.serve.tenants import add_key
from small_server import Started, save_adapter, started, wait_until

SECONDS = float(os.environ.get("SOAK_SECONDS", "1800"))
NAMES = ["one", "two", "three", "four", "base"]
PROMPTS = ["hello", "two large lattes for maria", "a slice of cake, please, and " * 6]


class Soak:
    """Clients of every kind, until the time is over."""

    def __init__(self, server: Started, keys: dict[str, str], expected: dict[tuple[str, str], str]) -> None:
        self.server, self.keys, self.expected = server, keys, expected
        self.end = time.monotonic() + SECONDS
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def run(self) -> None:
        clients = [self.reader] * 6 + [self.vanisher] * 2 + [self.slow, self.clumsy, self.admin, self.intruder]
        threads = [threading.Thread(target=self.repeat, args=(client, n)) for n, client in enumerate(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def repeat(self, client: Any, seed: int) -> None:
        draws = random.Random(seed)
        while time.monotonic() < self.end and not self.failures:
            try:
                client(draws)
                self.counts[client.__name__] += 1
            except Exception as error:
                self.failures.append(f"{client.__name__}: {error!r}")

    def body(self, draws: random.Random, **changes: Any) -> dict[str, Any]:
        return {
            "model": draws.choice(NAMES),
            "prompt": draws.choice(PROMPTS),
            "max_tokens": 12,
            "temperature": 0,
            **changes,
        }

    def reader(self, draws: random.Random) -> None:
        body = self.body(draws, stream=draws.random() < 0.5)
        answer = self.server.post("/v1/completions", body, self.keys["all"])
        if answer.status_code in (429, 503):
            assert int(answer.headers["retry-after"]) >= 1
            self.counts["busy"] += 1
            return
        assert answer.status_code == 200, answer.text
        if body["stream"]:
            events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
            assert events[-1] == "[DONE]"
            text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
        else:
            text = answer.json()["choices"][0]["text"]
        assert text == self.expected[body["model"], body["prompt"]], "a wrong row"

    def vanisher(self, draws: random.Random) -> None:
        with self.connected(
            self.body(draws, stream=draws.random() < 0.5, max_tokens=200, ignore_eos=True)
        ) as connection:
            time.sleep(draws.random() * 0.2)
            if draws.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def slow(self, draws: random.Random) -> None:
        with self.connected(self.body(draws, stream=True)) as connection:
            connection.settimeout(60)
            while connection.recv(64):
                time.sleep(0.01)

    def connected(self, body: dict[str, Any]) -> socket.socket:
        host, port = self.server.url.removeprefix("http://").split(":")
        connection, data = socket.create_connection((host, int(port))), json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {self.keys['all']}\r\n"
        head += f"connection: close\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        return connection

    def clumsy(self, draws: random.Random) -> None:
        body = self.body(draws, **draws.choice([{"model": "nobody"}, {"n": 0}, {"odd": 1}, {"prompt": "x " * 2000}]))
        answer = self.server.post("/v1/completions", body, self.keys["all"])
        if answer.status_code == 503:
            # Only what is encoded first to be seen to be too long waits for its turn, and the queue may be full.
            assert str(body["prompt"]).startswith("x "), answer.text
            self.counts["busy"] += 1
        else:
            assert answer.status_code in (400, 404), answer.text
        content = draws.randbytes(draws.randrange(200))
        headers = {"authorization": f"Bearer {self.keys['all']}", "content-type": "application/json"}
        answer = httpx.post(f"{self.server.url}/v1/completions", content=content, headers=headers, timeout=60)
        assert answer.status_code == 400

    def admin(self, draws: random.Random) -> None:
        load, unload = ({"lora_name": "temporary", "lora_path": draws.choice(NAMES[:4])}, {"lora_name": "temporary"})
        answer = self.server.post("/v1/load_lora_adapter", load, self.keys["root"])
        assert answer.status_code in (200, 503), answer.text
        if answer.status_code == 200:
            force = draws.random() < 0.5
            answer = self.server.post("/v1/unload_lora_adapter", unload | {"force": force}, self.keys["root"])
            assert answer.status_code == 200, answer.text
        assert self.server.get("/metrics", self.keys["root"]).status_code == 200

    def intruder(self, draws: random.Random) -> None:
        assert self.server.post("/v1/completions", self.body(draws), "sk-guessed").status_code == 401
        body = self.body(draws, model=draws.choice(NAMES[1:4]))
        assert self.server.post("/v1/completions", body, self.keys["few"]).status_code in (404, 429)


@pytest.mark.soak
def test_nothing_is_lost_wrong_or_left_behind(tmp_path: Path) -> None:
    adapters, file = tmp_path / "adapters", tmp_path / "keys.yaml"
    for number, name in enumerate(NAMES[:4]):
        save_adapter(adapters / name, number)
    size = (adapters / "one" / "adapter_model.safetensors").stat().st_size
    keys = {
        "all": add_key(file, "all", {"adapters": ("*",)}),
        "few": add_key(file, "few", {"adapters": ("one",), "requests_per_minute": 600}),
        "root": add_key(file, "root", {"admin": True}),
    }
    with started(adapters, file, memory=int(3.5 * size), slots=4, queue=32) as server:
        expected = {}
        for name in NAMES:
            for prompt in PROMPTS:
                body = {"model": name, "prompt": prompt, "max_tokens": 12, "temperature": 0}
                expected[name, prompt] = server.post("/v1/completions", body, keys["all"]).json()["choices"][0]["text"]
        soak = Soak(server, keys, expected)
        process = psutil.Process()
        gc.collect()
        before, threads, files = process.memory_info().rss, threading.active_count(), process.num_fds()
        soak.run()
        assert not soak.failures
        stats: Any = server.gateway.backend.stats
        wait_until(lambda: stats().running == stats().waiting == 0)
        wait_until(lambda: server.gateway.queue.running == server.gateway.queue.waiting == 0)
        assert not any(adapter.users for adapter in server.gateway.registry)
        assert server.gateway.registry.find("temporary") is None
        assert stats().adapter_bytes == sum(adapter.bytes for adapter in server.gateway.registry)
        wait_until(lambda: process.num_fds() <= files + 8)
        wait_until(lambda: threading.active_count() <= threads + 8)
        gc.collect()
        print(dict(soak.counts), f"{(process.memory_info().rss - before) / 2**20:.1f} MiB more")
        assert process.memory_info().rss - before < 300 * 2**20
        for (name, prompt), text in expected.items():
            body = {"model": name, "prompt": prompt, "max_tokens": 12, "temperature": 0}
            assert server.post("/v1/completions", body, keys["all"]).json()["choices"][0]["text"] == text
    shutil.rmtree(adapters)
