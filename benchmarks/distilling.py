"""Stored teacher tokens against the teacher beside, and the divergences, on a pruned SmolLM2 and the demo's orders.

    python -m benchmarks.distilling stored       # stored against online
    python -m benchmarks.distilling divergences  # forward, reverse and Jensen-Shannon, and the answers alone

The teacher is the whole model, the student the one without 5 of its 30 layers, as `slimtune prune` chooses them, with
LoRA. Each run is one of `slimtune distill`. What it reached is the exact forward divergence from the teacher on orders
that are held out, at the tokens of the answers.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import transformers
import typer
from rich.console import Console
from torch import Tensor

import slimtune
from benchmarks import machine, page
from benchmarks.pruning import dense, over
from benchmarks.results import FOLDER, subtitle
from slimtune.console.screen import open_screen
from slimtune.data.demo_orders import make_orders
from slimtune.pipeline.train import run
from slimtune.recipe.recipe import Recipe
from slimtune.slim.cache import MANIFEST
from slimtune.slim.data import calibration_batches
from slimtune.slim.distill import distill
from slimtune.slim.prune import PruneConfig, prune

LAYERS, BATCH, RANK, RATE = 25, 4, 16, 1e-3
STORED: dict[str, dict[str, Any]] = {"the teacher at each step": {"top_k": 0}, "64 stored tokens": {"top_k": 64}}
DIVERGENCES: dict[str, dict[str, Any] | None] = {
    "forward KL": {"beta": 0.0},
    "Jensen-Shannon, beta 0.5": {"beta": 0.5, "top_k": 0},
    "reverse KL": {"beta": 1.0, "top_k": 0},
    "the answers of the data alone": None,
}
"""The distillation of each; None for a training."""

app = typer.Typer(add_completion=False)
console = Console()
Steps = Annotated[int, typer.Option(min=1, help=f"Steps of {BATCH} orders.")]
Seeds = Annotated[int, typer.Option(min=1, help="Of the adapter and the order of the rows.")]


@app.command()
def stored(steps: Steps = 5, seeds: Seeds = 3) -> None:
    """What is learned from stored tokens, and from the teacher beside; processor time and bytes of both."""
    for results, facts in runs(STORED, steps, seeds):
        rows = []
        online = results["the teacher at each step"]
        for title, own in results.items():
            of_online = [mine / other for (mine, _), (other, _) in zip(own, online, strict=True)]
            # The first run with stored tokens asks the teacher as well.
            shares = [mine / other for (_, mine), (_, other) in zip(own[1:], online[1:], strict=True)]
            processor = f"{median(shares):.2f}" if shares else ""
            rows.append((title, over([kl for kl, _ in own], 4), over(of_online, 3), processor))
        header = ("the student learns from", "KL from the teacher, held out", "/ online", "processor time / online")
        write("stored", header, rows, facts)


@app.command()
def divergences(steps: Steps = 5, seeds: Seeds = 3) -> None:
    """The losses of `slimtune distill` against each other, and against learning the answers alone."""
    for results, facts in runs(DIVERGENCES, steps, seeds):
        rows = [(title, over([kl for kl, _ in own], 4)) for title, own in results.items()]
        write("divergences", ("loss", "forward KL from the teacher, held out"), rows, facts)


def runs(
    ways: Mapping[str, dict[str, Any] | None], steps: int, seeds: int
) -> Iterator[tuple[dict[str, list[tuple[float, float]]], dict[str, Any]]]:
    """After each seed, of each way the divergences on held-out orders and the processor's seconds so far, and facts."""
    teacher, tokenizer = dense()
    train, held_out = make_orders(BATCH * steps, 16)
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = folder / "orders.jsonl"
        rows.write_text("".join(json.dumps({"messages": order.messages()}) + "\n" for order in train))
        student, _ = prune(teacher, PruneConfig(layers=LAYERS), calibration_batches(tokenizer, tokens=1024))
        for name, model in (("teacher", teacher), ("student", student)):
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        answers = [answer_of(tokenizer, order) for order in held_out]
        pruned = divergence(teacher, student, answers)
        for seed in range(seeds):
            for name, settings in ways.items():
                recipe = Recipe.of({
                    "model": {"name": str(folder / "student"), "dtype": "float32"},
                    "data": {"train": str(rows), "max_length": 256},
                    "method": {"name": "lora", "r": RANK, "target_modules": "all-linear"},
                    "training": {"learning_rate": RATE, "max_steps": steps, "batch_size": BATCH, "seed": seed},
                    "output": str(folder / "output"),
                    "distillation": settings and {"teacher": str(folder / "teacher"), "alpha": 1.0} | settings,
                })  # fmt: skip
                # Of this process alone, which others don't slow down by as much.
                began = time.process_time()
                if settings is None:
                    run(recipe, open_screen(True), overwrite=True, plans=False)
                else:
                    distill(recipe, open_screen(True), overwrite=True, plans=False, cache=folder / "cache")
                seconds = time.process_time() - began
                tuned = slimtune.load(folder / "output", dtype="float32", device="cpu")[0].eval()
                results[name].append((divergence(teacher, tuned, answers), seconds))
                console.print(f"seed {seed}, {name}: {results[name][-1]}", highlight=False)
            sizes = bytes_of(folder / "cache")
            facts = {"steps": steps, "seeds": seed + 1, "pruned": pruned, "bytes a token": mean(sizes), "runs": results}
            yield results, facts


def bytes_of(cache: Path) -> list[float]:
    """Bytes a learned token of each folder of stored answers."""
    sizes = []
    for manifest in cache.glob(f"*/{MANIFEST}"):
        shards = json.loads(manifest.read_text())["shards"]
        size = sum((manifest.parent / shard["name"]).stat().st_size for shard in shards)
        sizes.append(size / sum(sum(shard["counts"]) for shard in shards))
    return sizes


def answer_of(tokenizer: Any, order: Any) -> tuple[Tensor, int]:
    """The tokens (1, T) of an order with its answer, and where the answer begins."""
    ids = tokenizer.apply_chat_template(order.messages(), tokenize=True, return_tensors="pt")["input_ids"]
    question = tokenizer.apply_chat_template(order.question(), tokenize=True, add_generation_prompt=True)["input_ids"]
    return ids, len(question)


@torch.inference_mode()
def divergence(teacher: Any, student: Any, answers: list[tuple[Tensor, int]]) -> float:
    """The mean KL(teacher || student) at the tokens of the answers."""
    total = count = 0.0
    for ids, start in answers:
        log_p, log_q = (m(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1) for m in (teacher, student))
        total += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
        count += len(log_p)
    return total / count


def write(name: str, header: tuple[str, ...], rows: list[tuple[str, ...]], facts: dict[str, Any]) -> None:
    """The figures as JSON, and as a table of docs/slim.md."""
    on = machine.describe({"device": "cpu", "cpu_capability": torch.backends.cpu.get_cpu_capability()})
    document = {"machine": on, "date": machine.today(), "commit": machine.commit(), **facts}
    (FOLDER / f"distilling-{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    note = (
        f"SmolLM2 with {LAYERS} of its 30 layers, {facts['pruned']:.2f} from the teacher as it was pruned; LoRA with "
        f"r={RANK}, {facts['steps']} steps of {BATCH} orders, float32, 16 orders held out; mean and 95% interval over "
        f"{facts['seeds']} seeds; {facts['bytes a token']:.0f} bytes a stored token; {subtitle(on)} {document['date']}."
    )
    page.fill(page.PRUNED, name, f"{page.table(header, rows)}\n\n{note}")


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    sys.exit(app(prog_name="python -m benchmarks.distilling"))
