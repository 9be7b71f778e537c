"""What HTTP costs in serving: streamed answers of a started `slimtune serve`, beside the same engine in process.

Sixteen answers at once, greedy, each side in a process of its own; they take turns, and while one answers the other
sleeps. Ratios are taken round by round.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import httpx
import psutil
import torch
import transformers
import typer
from rich.console import Console

import slimtune
from benchmarks import machine
from benchmarks.lora import warn_if_busy
from benchmarks.prepare import model_folder
from benchmarks.results import FOLDER
from benchmarks.serving import AnswerTokens, Dtype, JsonPath, PromptTokens, Rounds
from slimtune.models.device import native_dtype

AT_ONCE = 16
ANY_TOKEN = (5, 40_000)
NO_LIMIT = httpx.Limits(max_connections=None)

app = typer.Typer(add_completion=False)
console = Console()


@contextmanager
def started(folder: str, dtype: str, context: int, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """The address and the process of `slimtune serve`, as a user starts it."""
    command = [sys.executable, "-m", "slimtune", "serve", folder, "--dtype", dtype, "--port", "0", "--json"]
    command += ["--slots", str(AT_ONCE), "--context", str(context), *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise RuntimeError(f"the server did not start; try it: {' '.join(command)}")
        yield json.loads(line)["url"], psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait()


async def streamed(url: str, prompts: Sequence[list[int]], answer: int, models: Sequence[str] = ("base",)) -> int:
    """Ask for all at once and read the streams to their ends; the number of answers' tokens.

    Args:
        models: what is asked, in turn.
    """

    async def one(client: httpx.AsyncClient, prompt: list[int], model: str) -> int:
        body = {"model": model, "prompt": prompt, "max_tokens": answer, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        last = ""
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    last = line
        return json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"]

    async with httpx.AsyncClient(timeout=None, limits=NO_LIMIT) as client:
        asked = (one(client, prompt, models[i % len(models)]) for i, prompt in enumerate(prompts))
        return sum(await asyncio.gather(*asked))


def in_process(engine: slimtune.Engine, prompts: Sequence[list[int]], answer: int) -> int:
    """The same by the engine."""
    params = slimtune.SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
    completions = engine.generate([slimtune.Request(tuple(prompt), params) for prompt in prompts])
    return sum(len(completion.tokens) for completion in completions)


def drawn(generator: random.Random, count: int, length: int) -> list[list[int]]:
    """New prompts, which nobody has read yet."""
    return [[generator.randrange(*ANY_TOKEN) for _ in range(length)] for _ in range(count)]


def processor_seconds(process: psutil.Process) -> float:
    """What a process has computed so far."""
    times = process.cpu_times()
    return times.user + times.system


def measured(url: str, server: psutil.Process, engine: slimtune.Engine, rounds: int, prompt: int, answer: int) -> Any:
    """Seconds of both sides by the clock and by their processors, round by round; the first round warms up."""
    draw, own = random.Random(0), psutil.Process()
    sides = {
        "HTTP": (server, lambda prompts: asyncio.run(streamed(url, prompts, answer))),
        "in process": (own, lambda prompts: in_process(engine, prompts, answer)),
    }
    results = []
    for _ in range(rounds + 1):
        prompts = drawn(draw, AT_ONCE, prompt)
        result = {}
        for name, (process, answers) in sides.items():
            clock, processor = time.perf_counter(), processor_seconds(process)
            tokens = answers(prompts)
            result[name] = {"clock": time.perf_counter() - clock, "processor": processor_seconds(process) - processor}
            if tokens != AT_ONCE * answer:
                raise RuntimeError(f"{name} gave {tokens} tokens, not {AT_ONCE * answer}")
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
    """Measure what HTTP takes from SmolLM2's tokens a second.

    Example: python -m benchmarks.gateway --rounds 3
    """
    transformers.utils.logging.disable_progress_bar()
    warn_if_busy()
    folder, dtype, context = model_folder(), dtype or str(native_dtype()).removeprefix("torch."), prompt + answer + 16
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    engine = slimtune.Engine(model.eval(), tokenizer, slots=AT_ONCE, context=context)
    with started(folder, dtype, context) as (url, server):
        # As the server's own is.
        engine.start()
        results = measured(url, server, engine, rounds, prompt, answer)
        engine.stop()
    for kind in ("clock", "processor"):
        ratios = [one["in process"][kind] / one["HTTP"][kind] for one in results]
        speed = AT_ONCE * answer / median(one["HTTP"][kind] for one in results)
        console.print(
            f"{kind:9}  HTTP {speed:7.1f} tokens/s, {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) of what "
            "the engine gives in process",
            highlight=False,
        )
    on = machine.describe(
        {"device": "cpu", "threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    )
    target = json_path or FOLDER / f"gateway-{machine.host_kind(on)}.json"
    settings = {"prompt": prompt, "answer": answer, "dtype": dtype}
    document = {"machine": on, "commit": machine.commit(), "settings": settings, "rounds": results}
    target.write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"Written: {os.path.relpath(target)}", highlight=False)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.gateway")
