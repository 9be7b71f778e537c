"""What many adapters on one base cost in serving: the engine beside transformers' batches, in turns in one process.

Sixteen sequences are answered at once, greedy, each prompt of the same length. All share one model and take turns, so
that what else the machine does hits all alike; ratios to the engine's base are taken round by round.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import slimtune
from benchmarks import machine
from benchmarks.lora import warn_if_busy
from benchmarks.prepare import model_folder
from benchmarks.results import FOLDER
from benchmarks.table import digits
from slimtune.adapters.rows import BASE
from slimtune.engine.request import TokenEvent
from slimtune.models.device import native_dtype

AT_ONCE = 16
LORAS = [f"lora-{i}" for i in range(8)]
MIXED = ["lora-0", "dora", "ia3", "bottleneck", "prefix", None]
FIRST = slimtune.SamplingParams(max_tokens=1, temperature=0)
ALL_LINEAR = {"r": 8, "target_modules": "all-linear"}

Rounds = Annotated[int, typer.Option(min=1, help="How often all take turns.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")]
AnswerTokens = Annotated[int, typer.Option(min=2, help="Tokens of each answer.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; else what the processor computes in.")]
JsonPath = Annotated[Path | None, typer.Option("--json", help="Where to write the results.")]

app = typer.Typer(add_completion=False)
console = Console()


def adapter_configs() -> dict[str, Any]:
    """The adapters, as they start: what their numbers are makes no difference to their cost."""
    return {name: slimtune.LoraConfig(**ALL_LINEAR, init_lora_weights=False) for name in LORAS} | {
        "dora": slimtune.LoraConfig(**ALL_LINEAR, use_dora=True, init_lora_weights=False),
        "ia3": slimtune.IA3Config(),
        "bottleneck": slimtune.BottleneckConfig(),
        "prefix": slimtune.PrefixTuningConfig(num_virtual_tokens=10),
    }


def base_with_adapters(source: str, dtype: str | torch.dtype, names: Sequence[str]) -> Any:
    """SmolLM2 with these adapters."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    for name, config in adapter_configs().items():
        if name in names:
            slimtune.get_peft_model(base, config, name) if name == names[0] else base.add_adapter(name, config)
    return base.eval()


def drawn_prompts(vocabulary: int, length: int) -> list[list[int]]:
    """Tokens of all prompts, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, vocabulary, (AT_ONCE, length), generator=generator).tolist()


def context_of(prompt: int, answer: int) -> int:
    """What the slots are made for."""
    return prompt + answer + 16


class Work:
    """One batch of requests and the ways to answer it."""

    def __init__(self, model: Any, tokenizer: Any, prompts: list[list[int]], answer: int) -> None:
        self.model, self.prompts, self.answer = model, prompts, answer
        context = context_of(len(prompts[0]), answer)
        self.engine = slimtune.Engine(model, tokenizer, slots=AT_ONCE, context=context)
        self.turn = 0

    def requests(self, names: Sequence[str | None]) -> list[slimtune.Request]:
        # A tenant of its own for each turn, or the prompts would have been read already.
        self.turn += 1
        params = slimtune.SamplingParams(max_tokens=self.answer, temperature=0, ignore_eos=True)
        return [
            slimtune.Request(tuple(prompt), params, names[i % len(names)], tenant=str(self.turn))
            for i, prompt in enumerate(self.prompts)
        ]

    @contextmanager
    def started(self) -> Iterator[slimtune.Engine]:
        """The engine while it runs by itself."""
        self.engine.start()
        try:
            yield self.engine
        finally:
            self.engine.stop()

    def by_engine(self, names: Sequence[str | None]) -> Callable[[], Any]:
        return lambda: self.engine.generate(self.requests(names))

    def warm_up(self, names: Sequence[str | None]) -> None:
        """Use adapters once, as a server has that runs for a while: their factors are joined then."""
        self.engine.generate([replace(each, sampling=FIRST) for each in self.requests(names)])

    def by_batch(self, names: Sequence[str] | None) -> Callable[[], Any]:
        """transformers' generate on one padded batch; by row with slimtune's adapter_names."""
        options: dict[str, Any] = {"min_new_tokens": self.answer, "max_new_tokens": self.answer, "do_sample": False}
        rows = [names[i % len(names)] for i in range(AT_ONCE)] if names else [BASE] * AT_ONCE
        ids = torch.tensor(self.prompts)
        return lambda: self.model.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0, adapter_names=rows, **options
        )


@torch.inference_mode()
def throughput(work: Work, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of each way to answer, one a round; a first round of each warms up."""
    served: dict[str, list[str | None]] = {
        "engine, base": [None], "engine, 8 LoRA": [*LORAS], "engine, five methods mixed": [*MIXED],
    }  # fmt: skip
    ways = {name: work.by_engine(adapters) for name, adapters in served.items()} | {
        "batch, base": work.by_batch(None),
        "batch, 8 LoRA (adapter_names)": work.by_batch(LORAS),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            # Started as in a server, which holds the weights in another order than transformers has them.
            with work.started() if name in served else nullcontext():
                if name in served:
                    work.warm_up(served[name])
                clock, processor = time.perf_counter(), time.process_time()
                way()
                took = {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}
            if turn:
                found[name].append(took)
    return found


class Watched:
    """A request with the time of each of its tokens."""

    def __init__(self) -> None:
        self.submitted = time.perf_counter()
        self.times: list[float] = []
        self.done = threading.Event()

    def __call__(self, events: Sequence[TokenEvent]) -> None:
        self.times += [time.perf_counter()] * len(events)
        if events[-1].finish_reason:
            self.done.set()

    @property
    def gaps(self) -> list[float]:
        return self.gaps_in(self.submitted, self.times[-1])

    def gaps_in(self, begin: float, end: float) -> list[float]:
        """Those that a stretch of time touches."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [later - earlier for earlier, later in pairs if later > begin and earlier < end]


def latency(work: Work, folder: Path) -> dict[str, float]:
    """Milliseconds: to the first token with all at once; between tokens while others arrive; to load an adapter."""
    with work.started() as engine:
        at_once = _answered(work, pause=0.0)
        steady = [gap for one in at_once for gap in one.gaps]
        arriving = _answered(work, pause=median(steady) * 3)
        watched = _submitted(work, LORAS[:4])
        # Behind the prompts, which hold answers up longer than a load does.
        while not all(one.times for one in watched):
            time.sleep(median(steady))
        started = time.perf_counter()
        engine.load_adapter("hot", folder)
        loaded = time.perf_counter()
        for one in watched:
            one.done.wait()
        engine.unload_adapter("hot")
    gaps = [gap for one in arriving for gap in one.gaps]
    return {
        "first token, p99, 16 at once": 1000 * _p99([one.times[0] - one.submitted for one in at_once]),
        "between tokens, p50, with arrivals": 1000 * median(gaps),
        "between tokens, p99, with arrivals": 1000 * _p99(gaps),
        "an adapter from disk to ready": 1000 * (loaded - started),
        "longest gap of others meanwhile": 1000 * max(gap for one in watched for gap in one.gaps_in(started, loaded)),
    }


def _submitted(work: Work, names: Sequence[str | None], pause: float = 0.0) -> list[Watched]:
    watched = []
    for request in work.requests(names):
        watched.append(Watched())
        work.engine.submit(request, watched[-1])
        time.sleep(pause)
    return watched


def _answered(work: Work, pause: float) -> list[Watched]:
    watched = _submitted(work, LORAS, pause)
    for one in watched:
        one.done.wait()
    return watched


def _p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98]


def shown(seconds: dict[str, list[dict[str, float]]], tokens: int) -> Table:
    """Tokens a second, and ratios to the engine's base with their range over the rounds."""
    table = Table(title=f"{AT_ONCE} sequences at once", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("way", no_wrap=True)
    for column in ("tokens/s", "of base", "range", "cpu, of base", "range"):
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    base = next(iter(seconds.values()))
    for name, own in seconds.items():
        cells = [digits(tokens / median(one["clock"] for one in own))]
        for kind in ("clock", "processor"):
            ratios = [reference[kind] / one[kind] for one, reference in zip(own, base, strict=True)]
            cells += [f"{median(ratios):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}"]
        table.add_row(name, *cells)
    return table


@app.command()
def main(
    rounds: Rounds = 5,
    prompt: PromptTokens = 32,
    answer: AnswerTokens = 48,
    dtype: Dtype = "",
    json_path: JsonPath = None,
    model: Annotated[str, typer.Option(help="A folder with SmolLM2, if not the packaged one.")] = "",
) -> None:
    """Measure the engine on SmolLM2 with the base, eight LoRAs and a mixture of methods, beside transformers' batches.

    Example: python -m benchmarks.serving --rounds 3
    """
    warn_if_busy()
    source = model or model_folder()
    base = base_with_adapters(source, dtype or native_dtype(), list(adapter_configs()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder, selected_adapters=[LORAS[0]])
        work = Work(base, tokenizer, drawn_prompts(base.config.vocab_size, prompt), answer)
        seconds = throughput(work, rounds)
        console.print(shown(seconds, AT_ONCE * answer))
        milliseconds = latency(work, Path(folder, LORAS[0]))
    for title, value in milliseconds.items():
        console.print(f"{title:36} {value:8.1f} ms", highlight=False)
    on = machine.describe(
        {"device": "cpu", "threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    )
    target = json_path or FOLDER / f"serving-{machine.host_kind(on)}.json"
    settings = {"prompt": prompt, "answer": answer, "dtype": str(base.dtype)}
    document = {"machine": on, "commit": machine.commit(), "settings": settings} | {
        "seconds": seconds,
        "milliseconds": milliseconds,
    }
    target.write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"Written: {os.path.relpath(target)}", highlight=False)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.serving")
