"""Greedy answers to questions: static batches, as `slimtune evaluate` has them, beside the engine, in turns.

    python -m benchmarks.answering ADAPTER orders/held_out.jsonl

Static batches run until their longest answer has ended, and what all prompts begin with is read once; the engine gives
a free slot to the next question. Seconds of the processor are told beside the clock's, for a machine that is busy.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console

import slimtune
from benchmarks import machine
from benchmarks.lora import warn_if_busy
from slimtune.data.chat_template import prompt_ids
from slimtune.evaluate.generation import generate_batch
from slimtune.evaluate.tasks import open_task, prompt

app = typer.Typer(add_completion=False)
console = Console()


def by_engine(model: Any, tokenizer: Any, prompts: list[str], most: int, batch_size: int) -> list[str]:
    rows = [prompt_ids(tokenizer, text) for text in prompts]
    longest = max(map(len, rows))
    engine = slimtune.Engine(model, tokenizer, slots=min(batch_size, len(rows)), context=longest + most + 1)
    greedy = slimtune.SamplingParams(max_tokens=most, temperature=0)
    adapter = next(iter(getattr(model, "peft_config", {})), None)
    answers = engine.generate([slimtune.Request(tuple(row), greedy, adapter) for row in rows])
    return [answer.text.strip() for answer in answers]


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="An adapter or a model.")],
    data: Annotated[Path, typer.Argument(help="The questions.")],
    limit: Annotated[int, typer.Option(min=2, help="So many questions.")] = 80,
    most: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers at once.")] = 32,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="How often both take turns.")] = 3,
) -> None:
    """Measure both, and say whether they answer alike."""
    warn_if_busy()
    loaded, tokenizer = slimtune.load(model, dtype=dtype)
    task = open_task(str(data))
    prompts = [prompt(tokenizer, question, [], task.instruction) for question in task.questions[:limit]]
    ways = {
        "static": lambda: generate_batch(loaded, tokenizer, prompts, most, batch_size=batch_size),
        "engine": lambda: by_engine(loaded, tokenizer, prompts, most, batch_size),
    }
    ratios, alike = [], 0
    for number in range(rounds):
        took, answers = {}, {}
        for name, answer in ways.items():
            clock, processor = time.perf_counter(), time.process_time()
            answers[name] = answer()
            took[name] = (time.perf_counter() - clock, time.process_time() - processor)
            console.print(f"round {number + 1}, {name}: {took[name][0]:.1f} s, {took[name][1]:.1f} s of the processor")
        ratios.append([took["static"][i] / took["engine"][i] for i in (0, 1)])
        alike = sum(one == other for one, other in zip(answers["static"], answers["engine"], strict=True))
    clock, processor = (median(column) for column in zip(*ratios, strict=True))
    console.print(
        f"static / engine: {clock:.2f} by the clock, {processor:.2f} by the processor; {alike} of {len(prompts)} "
        f"alike; {machine.cpu_model()}, {machine.cores()} cores, {machine.today()}"
    )


if __name__ == "__main__":
    app()
