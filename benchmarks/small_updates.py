"""What a 16-bit model learns of small updates: `python -m benchmarks.small_updates`.

First, of an update x A^T B^T of some size beside the output y = x W^T, how much arrives in bf16: the coefficient of
y - x W^T on the update, 1 where nothing is lost and 0 where it all is. The update is added onto a product that is
rounded already, as `peft` does it, or the product onto the update, as slimtune does it.

Then SmolLM2 learns the demo's orders with small learning rates, by `peft` and by slimtune, in bf16 and in float32,
and by ways of learning more of small updates: with a residual stream in float32, with outputs that are rounded at
random, with A or the scale started larger, and with B at a larger rate (LoRA+). The mean loss over the steps, and the
steps and seconds to a loss; the same data and starts by seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Annotated, Any

import peft
import torch
import transformers
import typer
from torch import Tensor, nn

import slimtune
from benchmarks.machine import cpu_model, today
from benchmarks.prepare import model_folder
from benchmarks.pruning import over
from slimtune.data.demo_orders import Example, make_orders

TOKENS, OUTPUTS, INPUTS, RANK = 608, 1536, 576, 8
SHARES = (1e-2, 1e-3, 5e-4, 1e-4)
"""Sizes of an update beside the output's."""
BATCH, SMOOTHED = 8, 3


def residual_in_float32(model: Any) -> None:
    """The embeddings give float32, and so do sums with it; what the norms give goes into the layers in bf16."""
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.float())
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.register_forward_hook(lambda _module, _inputs, output: output.bfloat16())
        elif "Rotary" in type(module).__name__:  # its cosines take the stream's dtype
            module.register_forward_hook(lambda _module, _inputs, output: tuple(each.bfloat16() for each in output))


def rounded_at_random(model: Any) -> None:
    """An adapted layer's sum in float32, rounded to one of its two neighbours in bf16, the nearer one more often.

    It is computed twice, so that its time says nothing of what a kernel would take.
    """

    def again(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, delta = inputs[0].detach().float(), layer.deltas["default"]
        with torch.no_grad():
            update = (x @ delta.lora_A.t()) @ delta.lora_B.t()
            exact = x @ layer.weight.float().t() + layer.scaling["default"] * update
            bits = exact.view(torch.int32) + torch.randint_like(exact, 1 << 16, dtype=torch.int32)
            rounded = (bits & -(1 << 16)).view(torch.float32).bfloat16()  # the upper 16 bits are bf16
        return output + (rounded - output).detach()  # the difference of neighbours is exact

    for module in model.modules():
        if hasattr(module, "deltas"):
            module.register_forward_hook(again)


def larger_start(factor: float) -> Callable[[Any], None]:
    """A begins so many times as large."""

    def scale(model: Any) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.mul_(factor)

    return scale


@dataclass(frozen=True)
class Way:
    """A library, what it computes in, and what is done to its model and its learning rates."""

    name: str
    library: Any = slimtune
    dtype: torch.dtype = torch.bfloat16
    prepare: Callable[[Any], None] | None = None
    scale: float = 2.0
    ratio_of_rates: float = 1.0
    """How many times faster B learns than A."""


WAYS = (
    Way("slimtune"),
    Way("peft", library=peft),
    Way("slimtune, float32", dtype=torch.float32),
    Way("residual stream in float32", prepare=residual_in_float32),
    Way("outputs rounded at random", prepare=rounded_at_random),
    Way("A started 4 times as large", prepare=larger_start(4)),
    Way("a scale 4 times as large", scale=8.0),
    Way("B learns 4 times as fast", ratio_of_rates=4),
    Way("B learns 16 times as fast", ratio_of_rates=16),
)


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


def losses(way: Way, seed: int, rate: float, steps: int) -> tuple[list[float], float]:
    """By step, of float32 adapters on all linear layers, and the seconds of a step."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder())
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_folder(), dtype=way.dtype)
    torch.manual_seed(seed)
    config = way.library.LoraConfig(
        r=RANK, lora_alpha=way.scale * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = way.library.get_peft_model(model, config).train()
    if way.prepare:
        way.prepare(model)
    optimizer = torch.optim.AdamW(groups(model, rate, way.ratio_of_rates), weight_decay=0.0)
    orders, seen = make_orders(BATCH * steps, 1, seed)[0], []
    began = time.perf_counter()
    for first in range(0, len(orders), BATCH):
        loss = model(**batch_of(tokenizer, orders[first : first + BATCH])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen, (time.perf_counter() - began) / steps


def groups(model: nn.Module, rate: float, ratio: float) -> list[dict[str, Any]]:
    """A's parameters at the rate, B's at so many times of it."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in trained if "lora_B" not in name], "lr": rate},
        {"params": [parameter for name, parameter in trained if "lora_B" in name], "lr": rate * ratio},
    ]


def steps_to(loss: float, seen: list[float]) -> int | None:
    """The first step at which the mean of the last few is as low; none if it never is."""
    means = [mean(seen[max(0, at - SMOOTHED + 1) : at + 1]) for at in range(len(seen))]
    return next((at + 1 for at, of in enumerate(means) if of <= loss), None)


def main(
    seeds: Annotated[int, typer.Option(min=2, help="Of the orders and of the adapters.")] = 3,
    rate: Annotated[
        list[float] | None, typer.Option(help="A learning rate, constant; several are given apart.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help=f"Of {BATCH} orders.")] = 30,
    only: Annotated[
        list[str] | None, typer.Option(help="Ways whose names have this in them; all of them otherwise.")
    ] = None,
    reach: Annotated[float, typer.Option(help="The loss to which steps are counted.")] = 0.3,
) -> None:
    """Print two Markdown tables."""
    print("| update / output | added onto the product | the product onto it |\n|---|---|---|")
    for share in SHARES:
        print(f"| {share:g} | " + " | ".join(f"{of:.2f}" for of in arrives(share)) + " |")
    print(
        f"\n| rate | way | mean loss of {steps} steps | the last 10 | steps to {reach:g} | seconds to it | s a step |"
    )
    print("|---|---|---|---|---|---|---|")
    for each in rate or [1e-4]:
        for way in [way for way in WAYS if not only or any(word in way.name for word in only)]:
            runs = [losses(way, seed, each, steps) for seed in range(seeds)]
            seconds = mean(took for _, took in runs)
            cells = over([mean(run) for run, _ in runs], digits=3), over([mean(run[-10:]) for run, _ in runs], digits=3)
            needed = [at for run, _ in runs if (at := steps_to(reach, run)) is not None]
            if len(needed) == seeds:
                to = over(needed, digits=1), f"{mean(needed) * seconds:.0f}"
            else:
                to = f"{len(needed)} of {seeds} seeds", ""
            print(f"| {each:g} | {way.name} | {' | '.join((*cells, *to))} | {seconds:.2f} |", flush=True)
    print(f"\nSmolLM2-135M, {seeds} seeds; {cpu_model()}, torch {torch.__version__}, {today()}")


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    typer.run(main)
