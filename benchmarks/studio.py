"""How long the studio takes: its start, its first page, and every page after that, over a folder of many runs.

python -m benchmarks.studio --runs 200
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import httpx
import typer

from benchmarks import machine
from benchmarks.lora import warn_if_busy

ASKS = 20
PAGES = ("/", "/?search=run-1", "/train", "/runs/run-1", "/curves?name=run-1&name=run-2")


def main(runs: Annotated[int, typer.Option(min=2, help="Runs in the folder.")] = 200) -> None:
    """Print seconds until the first page is there, and milliseconds of the pages after it."""
    warn_if_busy()
    print(f"{machine.cpu_model()}, {machine.cores()} cores, {time.strftime('%Y-%m-%d')}, {runs} runs")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(runs):
            _write_run(folder / f"run-{number}")
        began = time.perf_counter()
        words = ["studio", "--port", "0", "--json", "--folder", str(folder)]
        process = subprocess.Popen([sys.executable, "-m", "slimtune", *words], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            url = json.loads(process.stdout.readline())["url"]
            listens = time.perf_counter() - began
            with httpx.Client(base_url=url, timeout=120) as client:
                first = _seconds(client, "/")
                print(f"start to listening {listens:.2f} s; the first page then {first:.3f} s")
                # The methods of the form are imported meanwhile.
                _seconds(client, "/train")
                for path in PAGES:
                    times = [_seconds(client, path) * 1000 for _ in range(ASKS)]
                    print(f"{path:32} {median(times):6.1f} ms, at most {max(times):.1f}")
        finally:
            process.kill()
            process.wait()


def _seconds(client: httpx.Client, path: str) -> float:
    began = time.perf_counter()
    client.get(path).raise_for_status()
    return time.perf_counter() - began


def _write_run(folder: Path) -> None:
    folder.mkdir()
    losses = ({"step": step, "tokens": 1000 * step, "loss": 3 / step} for step in range(1, 501))
    (folder / "loss.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in losses))
    results = {"base": "smollm2-135m-instruct", "method": "lora", "final_loss": 0.5, "seconds": 100.0}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "recipe.yaml").write_text("model:\n  name: base\nmethod:\n  name: lora\n  r: 8\n")


if __name__ == "__main__":
    typer.run(main)
