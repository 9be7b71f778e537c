"""What a 16-bit model learns of small updates: `python -m benchmarks.small_updates`.

First, of an update x A^T B^T of some size beside the output y = x W^T, how much arrives in bf16: the coefficient of
y - x W^T on the update, 1 where nothing is lost and 0 where it all is. The update is added onto a product that is
rounded already, as `peft` does it, or the product onto the update, as slimtune does it.

Then SmolLM2 learns the demo's orders with a small learning rate, by `peft` and by slimtune, in bf16 and in float32: the
mean loss over the steps, the same data and starts by seed.
"""

from __future__ import annotations

import math
import time
from statistics import mean
from typing import Annotated, Any

import peft
import torch
import transformers
import typer
from torch import Tensor

import slimtune
from benchmarks.machine import cpu_model, today
from benchmarks.prepare import model_folder
from benchmarks.pruning import over
from slimtune.data.demo_orders import Example, make_orders

TOKENS, OUTPUTS, INPUTS, RANK = 608, 1536, 576, 8
SHARES = (1e-2, 1e-3, 5e-4, 1e-4)
"""Sizes of an update beside the output's."""
BATCH = 8
SIDES = ((slimtune, torch.bfloat16), (peft, torch.bfloat16), (slimtune, torch.float32))


def arrives(share: float) -> tuple[float, float]:
    """Of an update of this size: added onto the rounded product, and the product onto it."""
    torch.manual_seed(0)
    x_TI, weight_OI, z_TR, b_OR = (
        torch.randn(shape).bfloat16()
        for shape in ((TOKENS, INPUTS), (OUTPUTS, INPUTS), (TOKENS, RANK), (OUTPUTS, RANK))
    )
    scale = share * math.sqrt(INPUTS / RANK)
    straight_TO, update_TO = x_TI.double() @ weight_OI.double().t(), scale * z_TR.double() @ b_OR.double().t()

    def coefficient(y_TO: Tensor) -> float:
        return float(((y_TO.double() - straight_TO) * update_TO).sum() / update_TO.square().sum())

    last = torch.nn.functional.linear(x_TI, weight_OI).addmm_(z_TR, b_OR.t(), alpha=scale)
    first = ((z_TR * scale) @ b_OR.t()).addmm_(x_TI, weight_OI.t())
    return coefficient(last), coefficient(first)


def batch_of(tokenizer: Any, orders: list[Example]) -> dict[str, Tensor]:
    """Padded to the right; the loss is on the answers."""
    rows = [order.messages() for order in orders]
    whole = [tokenizer.apply_chat_template(row, return_dict=False) for row in rows]
    prompts = [tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True, return_dict=False) for row in rows]
    shape = len(rows), max(map(len, whole))
    ids, labels, mask = torch.zeros(shape).long(), torch.full(shape, -100), torch.zeros(shape).long()
    for number, (row, prompt) in enumerate(zip(whole, prompts, strict=True)):
        ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
        labels[number, len(prompt) : len(row)] = torch.tensor(row[len(prompt) :])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def losses(library: Any, dtype: torch.dtype, seed: int, rate: float, steps: int) -> list[float]:
    """By step, of float32 adapters on all linear layers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder())
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_folder(), dtype=dtype)
    torch.manual_seed(seed)
    config = library.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = library.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    orders, seen = make_orders(BATCH * steps, 1, seed)[0], []
    for first in range(0, len(orders), BATCH):
        loss = model(**batch_of(tokenizer, orders[first : first + BATCH])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


def main(
    seeds: Annotated[int, typer.Option(min=2, help="Of the orders and of the adapters.")] = 3,
    rate: Annotated[float, typer.Option(help="The learning rate, constant.")] = 1e-4,
    steps: Annotated[int, typer.Option(min=1, help=f"Of {BATCH} orders.")] = 30,
) -> None:
    """Print two Markdown tables."""
    print("| update / output | added onto the product | the product onto it |\n|---|---|---|")
    for share in SHARES:
        print(f"| {share:g} | " + " | ".join(f"{found:.2f}" for found in arrives(share)) + " |")
    print(f"\n| library | computes in | mean loss of {steps} steps | the last 10 | s a step |\n|---|---|---|---|---|")
    for library, dtype in SIDES:
        began = time.perf_counter()
        runs = [losses(library, dtype, seed, rate, steps) for seed in range(seeds)]
        seconds = (time.perf_counter() - began) / seeds / steps
        cells = over([mean(run) for run in runs], digits=3), over([mean(run[-10:]) for run in runs], digits=3)
        kind = str(dtype).removeprefix("torch.")
        print(f"| {library.__name__} | {kind} | {' | '.join(cells)} | {seconds:.2f} |", flush=True)
    print(f"\nSmolLM2-135M, rate {rate:g}, {seeds} seeds; {cpu_model()}, torch {torch.__version__}, {today()}")


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    typer.run(main)
