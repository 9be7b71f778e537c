"""What fresh memory costs in a training step, under several allocators: `python -m benchmarks.allocators`.

A LoRA step of SmolLM2, in turns, each in a process of its own, with the allocator set from outside as a user would: the
processor's seconds of a step in the program and in the kernel, page faults, and the peak of memory. Another library is
measured where `--preload NAME=FILE.so` names one, as cmeel-mimalloc's wheel brings. With `--varied` each step has
another number of tokens, whose products oneDNN prepares and keeps.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Annotated, Any

import typer

from benchmarks.machine import PACKAGES, cores, cpu_model, installed, load, today
from slimtune.console.libraries import KEPT_PRODUCTS

ALLOCATORS: dict[str, dict[str, str]] = {
    "as it is": {},
    "huge pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    "kept": {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"},
    "kept, huge pages": {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296"
        ":glibc.malloc.trim_threshold=4294967296:glibc.malloc.top_pad=268435456"
    },
    "torch's huge pages": {"THP_MEM_ALLOC_ENABLE": "1"},
    "few products kept": KEPT_PRODUCTS,
}
"""By name, the environment of each; `kept` is memory that goes back to the heap and not to the system."""


def step_figures(batch: int, tokens: int, steps: int, dtype: str, varied: bool) -> dict[str, float]:
    """Medians over the steps after the first."""
    import torch

    import slimtune

    model, _ = slimtune.load("smollm2-135m-instruct", dtype, "cpu")
    model = slimtune.get_peft_model(model, slimtune.LoraConfig(r=16, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 40_000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    taken: list[list[float]] = []
    for step in range(steps + 1):
        if varied:
            ids = ids[:, : tokens - step]
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after = resource.getrusage(resource.RUSAGE_SELF)
        taken.append(
            [after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt,
             time.perf_counter() - began]
        )  # fmt: skip
    names = ("program", "kernel", "faults", "clock")
    medians = {name: statistics.median(each) for name, each in zip(names, zip(*taken[1:], strict=True), strict=True)}
    return medians | {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def run(environment: dict[str, str], step: list[Any]) -> dict[str, float]:
    """The figures of a process in this environment. Raises: CalledProcessError."""
    words = [sys.executable, "-m", "benchmarks.allocators", "--worker", json.dumps(step)]
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(
    rounds: int = 3,
    batch: int = 4,
    tokens: int = 256,
    steps: int = 4,
    dtype: str = "float32",
    varied: bool = False,
    only: Annotated[list[str] | None, typer.Option(help="An allocator; repeatable.")] = None,
    preload: Annotated[list[str] | None, typer.Option(help="NAME=FILE.so; repeatable.")] = None,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print a Markdown table of medians over the rounds."""
    if worker is not None:
        print(json.dumps(step_figures(*json.loads(worker))))
        return
    libraries = {name: {"LD_PRELOAD": path} for name, _, path in (words.partition("=") for words in preload or ())}
    chosen = {n: env for n, env in (ALLOCATORS | libraries).items() if not only or n in only or n in libraries}
    versions = ", ".join(f"{package} {installed(package)}" for package in PACKAGES)
    print(f"{cpu_model()}, {cores()} cores, load {load():.0f}; {versions}; {today()}")
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for _ in range(rounds):
        for name, environment in chosen.items():
            figures[name].append(run(environment, [batch, tokens, steps, dtype, varied]))
            print(f"  {name}: {figures[name][-1]}", file=sys.stderr)
    print(
        f"\n| allocator, {batch} x {tokens}, {dtype} | program | kernel | page faults | peak |\n|---|---|---|---|---|"
    )
    for name, each in figures.items():
        row = {key: statistics.median(one[key] for one in each) for key in each[0]}
        seconds = f"{row['program']:.2f} s | {row['kernel']:.2f} s"
        print(f"| {name} | {seconds} | {row['faults']:,.0f} | {row['peak_gb']:.2f} GB |")


if __name__ == "__main__":
    typer.run(main)
