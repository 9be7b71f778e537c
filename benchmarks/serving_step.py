"""Where a step of the engine spends its time: `python -m benchmarks.serving_step`.

A step that writes a token of each of 16 answers, and one that reads 256 tokens of prompts, without adapters, under
eight LoRAs and under four methods. Milliseconds by the clock, medians of rounds in turns; then, by torch's profiler,
those of products, of attention and of all other operators. What is left is Python, and what the profiler adds takes
from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import cores, cpu_model, load, today
from benchmarks.prepare import model_folder
from benchmarks.serving import AT_ONCE, LORAS, MIXED, adapter_configs, base_with_adapters, drawn_prompts
from slimtune.adapters.rows import BASE, RowAdapters
from slimtune.engine.model import attention_by_name, causal_model_slots, forward_of
from slimtune.engine.product import RowProduct
from slimtune.engine.slots import ATTENTION, KeyValueSlots, Piece, Step
from slimtune.engine.weights import reordered_weights

CHUNK, CONTEXT = 256, 128
SIDES: dict[str, Sequence[str | None]] = {
    "base": [None],
    "8 LoRA": LORAS,
    "four methods": [name for name in MIXED if name != "prefix"],  # whose keys and values no step computes
}
PRODUCTS = ("linear", "mm", "matmul")
ATTENTION_KERNELS = ("attention", "softmax")


class Steps:
    """Steps of one model, with what of the adapters is kept from one to the next."""

    def __init__(self, model: Any, memory: KeyValueSlots, behind: int) -> None:
        self.model, self.memory, self.behind = model, memory, behind
        self.products = {side: RowProduct(rank_budget=CHUNK) for side in SIDES}
        self.ids = [token for prompt in drawn_prompts(model.vocab_size, CHUNK // AT_ONCE) for token in prompt]

    def run(self, side: str, decodes: bool) -> None:
        """A token of each answer behind so many, or prompts from nothing, two rows to an adapter of eight."""
        length = 1 if decodes else CHUNK // AT_ONCE
        pieces = [Piece(slot, self.behind if decodes else 0, length) for slot in range(AT_ONCE)]
        step = Step(self.memory, *((pieces, []) if decodes else ([], pieces)))
        names = SIDES[side]
        rows = tuple(names[slot % len(names)] or BASE for slot in range(AT_ONCE) for _ in range(length))
        kept = tuple(range(length - 1, AT_ONCE * length, length))
        adapters = RowAdapters(rows, kept=kept, packed=True, product=self.products[side])
        with step.running(), self.model.adapter_state.using(applied=(), rows=adapters):
            forward_of(self.model, self.ids[: len(rows)], step.position_T, kept, [])


def shares(run: Callable[[], None], times: int = 5) -> tuple[float, float, float]:
    """Milliseconds of products, attention and other operators in one run."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(times):
            run()
    products = attention = others = 0.0
    for event in profiler.key_averages():
        milliseconds = event.self_cpu_time_total / 1000 / times
        if any(word in event.key for word in ATTENTION_KERNELS):
            attention += milliseconds
        elif event.key.startswith(("aten::", "mkldnn::")):
            if any(word in event.key for word in PRODUCTS):
                products += milliseconds
            else:
                others += milliseconds
    return products, attention, others


@torch.inference_mode()
def main(
    model: Annotated[str, typer.Option(help="A folder; the packaged SmolLM2 otherwise.")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    behind: Annotated[int, typer.Option(min=1, max=CONTEXT - 1, help="Tokens before an answer's.")] = 56,
    rounds: Annotated[int, typer.Option(min=1, help="How often all take turns.")] = 10,
) -> None:
    """Print a Markdown table.

    Example: python -m benchmarks.serving_step --rounds 5
    """
    print(f"{cpu_model()}, {cores()} cores, load {load():.0f}; torch {torch.__version__}; {today()}; {dtype}\n")
    print("| step | adapters | in all | of the base's | products | attention | other operators |")
    print("|---|---|---|---|---|---|---|")
    loaded = base_with_adapters(model or model_folder(), getattr(torch, dtype), list(adapter_configs()))
    memory = causal_model_slots(loaded, AT_ONCE, CONTEXT)
    steps = Steps(loaded, memory, behind)
    with reordered_weights(loaded), attention_by_name(loaded, ATTENTION):
        for decodes in (True, False):
            taken: dict[str, list[float]] = {side: [] for side in SIDES}
            for _ in range(rounds + 2):
                for side, seen in taken.items():
                    began = time.perf_counter()
                    steps.run(side, decodes)
                    seen.append(1000 * (time.perf_counter() - began))
            # The first two join factors and warm up.
            base = median(taken["base"][2:])
            for side, seen in taken.items():
                whole, parts = median(seen[2:]), shares(lambda side=side, decodes=decodes: steps.run(side, decodes))
                name = f"{AT_ONCE} tokens of answers" if decodes else f"{CHUNK} tokens of prompts"
                cells = [name, side, f"{whole:.1f} ms", f"{whole / base:.2f}", *(f"{part:.1f}" for part in parts)]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
