"""What an adapter costs at inference: the plain base, LoRA and DoRA beside peft's, merged LoRA, bottleneck adapters.

All share one base in one process and take turns, so that what else the machine does hits all alike; ratios to the
base are taken round by round and their median is shown.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import peft
import torch
import transformers
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import slimtune
from benchmarks import machine, page
from benchmarks.lora import warn_if_busy
from benchmarks.prepare import model_folder
from benchmarks.results import FOLDER, subtitle
from benchmarks.table import digits
from benchmarks.worker import lora_config, timed

BASE = "base"
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
BATCH, LENGTH = 1, 256
PROMPT, ANSWER = 16, 32

app = typer.Typer(add_completion=False)
console = Console()


def variants(base: Any) -> dict[str, Any]:
    """The base and what is put on it; they share the base's tensors."""

    def twin() -> Any:
        return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})

    found = {BASE: base}
    for method, dora in (("LoRA", False), ("DoRA", True)):
        for whose, library in (("", slimtune), (" of peft", peft)):
            found[f"{method}{whose}"] = library.get_peft_model(twin(), lora_config(library, dora=dora))
    found["LoRA merged"] = slimtune.get_peft_model(twin(), lora_config(slimtune)).merge_and_unload()
    for placement in PLACEMENTS:
        config = slimtune.BottleneckConfig(placement=placement, task_type="CAUSAL_LM")
        found[placement] = slimtune.get_peft_model(twin(), config)
    return {name: model.eval() for name, model in found.items()}


def works(vocabulary: int) -> dict[str, Callable[[Any], Any]]:
    """What is timed: a forward over a batch of texts, and greedy tokens after a short prompt."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, vocabulary, (BATCH, LENGTH), generator=generator)
    prompt = torch.randint(0, vocabulary, (1, PROMPT), generator=generator)
    options = {"min_new_tokens": ANSWER, "max_new_tokens": ANSWER, "do_sample": False}
    mask = torch.ones_like(prompt)
    return {
        f"forward of {BATCH} x {LENGTH} tokens": lambda model: model(input_ids=texts, use_cache=False),
        f"generation of {ANSWER} tokens": lambda model: model.generate(prompt, attention_mask=mask, **options),
    }


def clocked(action: Callable[[], Any]) -> dict[str, float]:
    """Seconds of an action by the clock, and of the processor, which other work on the machine moves less."""
    started = time.process_time()
    clock, _ = timed(action)
    return {"clock": clock, "processor": time.process_time() - started}


@torch.inference_mode()
def measure(models: dict[str, Any], rounds: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Seconds by work and variant, one a round; a first round of each warms up."""
    found = {}
    for title, work in works(models[BASE].config.vocab_size).items():
        turns = [
            {name: clocked(lambda model=model, work=work: work(model)) for name, model in models.items()}
            for _ in range(rounds + 1)
        ]
        found[title] = {name: [seconds[name] for seconds in turns[1:]] for name in models}
    return found


def shown(title: str, seconds: dict[str, list[dict[str, float]]], trainable: dict[str, int]) -> Table:
    """Medians, and ratios to the base with their range over the rounds."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("variant", no_wrap=True)
    for column in ("parameters", "ms", "/ base", "range", "cpu / base", "range"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, own in seconds.items():
        cells = [f"{trainable[name]:,}", digits(1000 * median(one["clock"] for one in own))]
        for kind in ("clock", "processor"):
            ratios = [one[kind] / base[kind] for one, base in zip(own, seconds[BASE], strict=True)]
            cells += [f"{median(ratios):.2f}", f"{digits(min(ratios))}-{digits(max(ratios))}"]
        table.add_row(name, *cells)
    return table


def published(document: dict[str, Any]) -> str:
    """The table of the docs: clock time over the base's."""

    def ratio(seconds: dict[str, list[dict[str, float]]], name: str) -> str:
        pairs = zip(seconds[name], seconds[BASE], strict=True)
        ratios = [one["clock"] / base["clock"] for one, base in pairs]
        return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"

    works = document["seconds"].values()
    names = [name for name in next(iter(works)) if name != BASE]
    rows = [(name, *(ratio(seconds, name) for seconds in works)) for name in names]
    base = ", ".join(f"{1000 * median(one['clock'] for one in s[BASE]):.0f} ms" for s in works)
    note = f"The plain base takes {base}. {subtitle(document['machine'])} {machine.today()}."
    return f"{page.table(('over the plain base', *document['seconds']), rows)}\n\n{note}"


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often all take turns.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write the results.")] = None,
    model: Annotated[str, typer.Option(help="A folder with SmolLM2, if not the packaged one.")] = "",
) -> None:
    """Measure forward and generation of SmolLM2 (bf16) with and without adapters, in turns in one process."""
    transformers.utils.logging.disable_progress_bar()
    warn_if_busy()
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(model or model_folder(), dtype=torch.bfloat16)
    models = variants(base.requires_grad_(False))
    trainable = {name: sum(p.numel() for p in one.parameters() if p.requires_grad) for name, one in models.items()}
    trainable["LoRA merged"] = trainable["LoRA"]
    found = measure(models, rounds)
    for title, seconds in found.items():
        console.print(shown(title, seconds, trainable))
    settings = {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    on = machine.describe(settings)
    target = json_path or FOLDER / f"inference-{machine.host_kind(on)}.json"
    document = {"machine": on, "commit": machine.commit(), "parameters": trainable, "seconds": found}
    target.write_text(json.dumps(document, indent=1) + "\n")
    if json_path is None:
        page.fill(machine.ROOT / "docs" / "figures" / "methods.md", "inference", published(document))
    console.print(f"Written: {os.path.relpath(target)}", highlight=False)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.inference")
