"""A thousand adapters registered with `slimtune serve`, 64 of them in use: tokens a second beside 8 in use, and memory.

The same number of requests goes to 64 adapters and to 8, in turns on one server; 16 are answered at a time. Memory is
what the server grows by while 32 adapters come to the 32 that are loaded, beside the bytes of their tensors.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file

from benchmarks import machine, page
from benchmarks.gateway import drawn, started, streamed
from benchmarks.lora import warn_if_busy
from benchmarks.prepare import model_folder
from benchmarks.results import FOLDER, subtitle
from benchmarks.serving import (
    LORAS,
    AnswerTokens,
    Dtype,
    JsonPath,
    PromptTokens,
    Rounds,
    base_with_adapters,
    context_of,
)
from benchmarks.table import digits
from slimtune.models.device import native_dtype
from slimtune.storage.peft_format import CONFIG_NAME, WEIGHTS_NAME, read_config, save_adapter

REGISTERED, IN_USE, FEW = 1000, 64, 8

app = typer.Typer(add_completion=False)
console = Console()


def write_adapters(folder: Path, source: str, dtype: str) -> list[str]:
    """Folders of LoRAs, as many of their own as are used; the others, which nobody reads, are links to the last one."""
    base_with_adapters(source, dtype, LORAS[:1]).save_pretrained(folder)
    (folder / LORAS[0]).rename(folder / "0")
    config, tensors = read_config(folder / "0"), load_file(folder / "0" / WEIGHTS_NAME)
    for index in range(1, IN_USE):
        other = {name: tensor[torch.randperm(len(tensor))] for name, tensor in tensors.items()}
        save_adapter(folder / str(index), config, other)
    for index in range(IN_USE, REGISTERED):
        (folder / str(index)).mkdir()
        for file in (CONFIG_NAME, WEIGHTS_NAME):
            os.link(folder / str(IN_USE - 1) / file, folder / str(index) / file)
    return [str(index) for index in range(IN_USE)]


def adapter_bytes(url: str) -> int:
    """What the server says that loaded adapters take."""
    found = re.search(r"^slimtune_adapter_bytes (\S+)", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert found, "the server counts the bytes of its adapters"
    return int(float(found[1]))


def first_uses(url: str, names: Sequence[str]) -> list[float]:
    """Seconds of a first answer of one token under each adapter, disk to token."""
    seconds = []
    for name in names:
        began = time.perf_counter()
        asyncio.run(streamed(url, [[7, 8, 9]], 1, [name]))
        seconds.append(time.perf_counter() - began)
    return seconds


def memory(url: str, server: psutil.Process, names: Sequence[str], prompt: int, answer: int) -> dict[str, float]:
    """What the server takes for each adapter of the second half, and for their tensors."""
    more = len(names) // 2
    # By then it has all that answering takes by itself: factors side by side up to the budget, memory of the threads.
    asyncio.run(streamed(url, drawn(random.Random(1), IN_USE, prompt), answer, names[:more]))
    before, bytes_before = server.memory_info().rss, adapter_bytes(url)
    seconds = first_uses(url, names[more:])
    return {
        "resident": (server.memory_info().rss - before) / more,
        "tensors": (adapter_bytes(url) - bytes_before) / more,
        "first use, seconds": median(seconds),
    }


def in_turns(url: str, names: Sequence[str], rounds: int, prompt: int, answer: int) -> list[dict[str, float]]:
    """Seconds for the same number of requests over few adapters and over all, round by round; the first warms up."""
    draw, results = random.Random(0), []
    for _ in range(rounds + 1):
        result = {}
        for some in (names[:FEW], names):
            prompts = drawn(draw, IN_USE, prompt)
            began = time.perf_counter()
            tokens = asyncio.run(streamed(url, prompts, answer, some))
            result[str(len(some))] = time.perf_counter() - began
            if tokens != IN_USE * answer:
                raise RuntimeError(f"{len(some)} adapters gave {tokens} tokens, not {IN_USE * answer}")
        results.append(result)
    return results[1:]


@app.command()
def main(
    rounds: Rounds = 5,
    prompt: PromptTokens = 32,
    answer: AnswerTokens = 48,
    dtype: Dtype = "",
    json_path: JsonPath = None,
) -> None:
    """Measure what it costs SmolLM2's server that a thousand adapters are registered and 64 of them in use.

    Example: python -m benchmarks.serving_pool --rounds 3
    """
    warn_if_busy()
    source, dtype = model_folder(), dtype or str(native_dtype()).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        names = write_adapters(Path(folder), source, dtype)
        options = ("--adapters", folder, "--queue-timeout", "600")
        with started(source, dtype, context_of(prompt, answer), *options) as (url, server):
            per_adapter = memory(url, server, names, prompt, answer)
            results = in_turns(url, names, rounds, prompt, answer)
    few, many = str(FEW), str(IN_USE)
    ratios = [one[few] / one[many] for one in results]
    tokens = IN_USE * answer
    over = per_adapter["resident"] / per_adapter["tensors"] - 1
    rows = [
        (f"tokens/s, {FEW} in use", digits(tokens / median(one[few] for one in results))),
        (f"tokens/s, {IN_USE} in use", digits(tokens / median(one[many] for one in results))),
        (f"{IN_USE} beside {FEW}", f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"),
        ("memory of an adapter", f"{per_adapter['resident'] / 1e6:.2f} MB, its tensors {over:+.0%}"),
        ("first use, from disk to the first token", f"{1000 * per_adapter['first use, seconds']:.0f} ms"),
    ]
    table = page.table((f"of {REGISTERED:,} registered", ""), rows)
    console.print(table, highlight=False, markup=False)
    on: dict[str, Any] = machine.describe({"device": "cpu", "cpu_capability": torch.backends.cpu.get_cpu_capability()})
    target = json_path or FOLDER / f"serving-pool-{machine.host_kind(on)}.json"
    settings = {"prompt": prompt, "answer": answer, "dtype": dtype, "registered": REGISTERED}
    document = {"machine": on, "commit": machine.commit(), "date": machine.today(), "settings": settings}
    target.write_text(json.dumps(document | {"bytes": per_adapter, "rounds": results}, indent=1) + "\n")
    console.print(f"Written: {os.path.relpath(target)}", highlight=False)
    if not json_path:
        page.fill(page.ENGINE, "serving pool", f"{table}\n\n{rounds} rounds; {subtitle(on)} {machine.today()}.")


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.serving_pool")
