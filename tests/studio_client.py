"""A studio without a server, as a page of its own would speak to it."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from slimtune.storage.text_files import dump
from slimtune.studio.app import build_app
from slimtune.studio.jobs import OWN_FOLDER
from slimtune.studio.security import TOKEN_HEADER, Access

ORIGIN = "http://127.0.0.1:8100"


def open_studio(folder: Path, access: Access | None = None, language: str = "en") -> TestClient:
    """A client with the token of the pages."""
    access = access or Access()
    headers = {TOKEN_HEADER: access.token, "accept-language": language}
    return TestClient(build_app(folder, access), base_url=ORIGIN, headers=headers)


def awaited(client: TestClient, path: str, **settings: Any) -> str:
    """What a page that asks again and again comes to."""
    for _ in range(1200):
        page = client.get(path, params={"tab": "1", **settings})
        assert page.status_code == 200, page.text
        if "hx-trigger" not in page.text:
            return page.text
        time.sleep(0.1)
    raise AssertionError("the answer didn't come")


def write_run(
    folder: Path, base: str = "base", method: str = "lora", losses: Sequence[float] = (), rank: int = 8
) -> Path:
    """A folder as a training leaves it, as far as the studio looks."""
    folder.mkdir(parents=True)
    entries = [{"step": step, "loss": loss} for step, loss in enumerate(losses or [3.0, 2.5, 2.0], 1)]
    results = {"base": base, "method": method, "final_loss": entries[-1]["loss"], "eval_loss": None, "seconds": 1.0}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "loss.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    recipe = {"model": {"name": base}, "method": {"name": method, "r": rank}, "output": str(folder)}
    (folder / "recipe.yaml").write_text(dump(recipe))
    return folder


@contextmanager
def held_queue(folder: Path) -> Iterator[None]:
    """Nothing is taken out of the queue of these runs: another process seems to do it."""
    lock = folder / OWN_FOLDER / "runner.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
