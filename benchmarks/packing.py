"""Tokens per second of packed rows against padded batches: `python -m benchmarks.packing`.

SmolLM2 with LoRA on the demo's orders and on texts of mixed lengths made of them, forward and backward. The sides take
turns, step by step, on the same examples; a step has about as many tokens on each. Padding counts as no token. Packed
rows are measured under a mask and with their examples attending apart, as `slimtune train` lets them, which computes
once what they begin with, too; padded batches and those under a mask share nothing. Printed as a table; the figures of
a machine that does other work besides say little.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated, Any

import torch
import typer

from benchmarks.machine import cores, cpu_model, load
from slimtune import LoraConfig, get_peft_model
from slimtune.data.batches import PackRows, PadRight, count_packed, pad_id_of
from slimtune.data.demo_orders import make_orders
from slimtune.data.encode import Encoded, encode
from slimtune.data.packing import check_packs, pack
from slimtune.data.rows import Conversation, Document
from slimtune.models.device import native_dtype
from slimtune.models.load import LoadOptions, load_model
from slimtune.models.shared_prefixes import shared_prefixes
from slimtune.models.short_attention import short_attention

MODEL = "smollm2-135m-instruct"


def examples_of(kind: str, tokenizer: Any, count: int = 160) -> list[Encoded]:
    """Orders, which are nearly of one length, or one to twelve of them joined to texts of mixed lengths."""
    orders = make_orders(count, 1)[0]
    if kind == "orders":
        rows = [Conversation.model_validate({"messages": order.messages()}) for order in orders]
        return encode(rows, tokenizer, 4096).examples
    rng = random.Random(0)
    texts = ["\n".join(order.sentence for order in rng.sample(orders, rng.randint(1, 12))) for _ in range(count)]
    return encode([Document(text=text) for text in texts], tokenizer, 4096).examples


def batches(examples: Sequence[Encoded], pad_id: int, model: Any, room: int, batch: int) -> dict[str, list[Any]]:
    """The batches of one epoch on all sides: of `batch` examples, or of as many rows as hold about as many tokens."""
    order = random.Random(0).sample(list(examples), len(examples))
    padded, packed = PadRight(pad_id), PackRows.of(model, pad_id)
    rows = random.Random(0).sample(found := pack(examples, room), len(found))
    each = max(1, round(batch * len(rows) / len(order)))
    in_rows = [packed(rows[i : i + each]) for i in range(0, len(rows), each)]
    return {
        "padded": [padded(order[i : i + batch]) for i in range(0, len(order), batch)],
        "packed": in_rows,
        "apart": in_rows,
    }


def step(model: Any, batch: dict[str, Any], apart: bool) -> float:
    """Seconds of a forward and a backward pass."""
    with short_attention(), shared_prefixes(model) if apart else nullcontext():
        began = time.perf_counter()
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)
        return time.perf_counter() - began


def tokens_of(batch: dict[str, Any]) -> int:
    """Without padding."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else count_packed(batch["position_ids"])


def rates(model: Any, sides: dict[str, list[Any]], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each round, the sides in turns and the first one changing."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in sorted(sides, reverse=number % 2 == 1):
            batch = sides[name][number % len(sides[name])]
            seconds = step(model, batch, name == "apart")
            if number:
                found[name].append(tokens_of(batch) / seconds)
    return found


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each side, after one that isn't counted.")] = 10,
    room: Annotated[int, typer.Option(min=128, help="Tokens of a packed row.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Examples of a padded batch.")] = 16,
) -> None:
    """Measure and print."""
    loaded, tokenizer = load_model(MODEL, "text", LoadOptions(native_dtype()))
    model: Any = get_peft_model(loaded, LoraConfig(r=16, target_modules="all-linear")).train()
    check_packs(model)
    print(f"{cpu_model()}, {cores()} cores, {torch.get_num_threads()} threads, load {load():.1f}, {model.dtype}\n")
    print("| data | padding | padded, tokens/s | packed | / padded | attending apart | / padded |")
    print("|---|---|---|---|---|---|---|")
    for kind in ("orders", "mixed lengths"):
        sides = batches(examples_of(kind, tokenizer), pad_id_of(tokenizer), model, room, batch)
        computed = sum(b["input_ids"].numel() for b in sides["padded"])
        padding = 1 - sum(map(tokens_of, sides["padded"])) / computed
        found = rates(model, sides, rounds)
        padded, *packed = (statistics.median(found[name]) for name in ("padded", "packed", "apart"))
        cells = [f"{rate:,.0f} | {rate / padded:.2f}" for rate in packed]
        print(f"| {kind} | {padding:.0%} | {padded:,.0f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
