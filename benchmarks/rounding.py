"""How the weights of a merged model are rounded to bf16, and what each way does to its answers.

`python -m benchmarks.rounding` trains a LoRA on SmolLM2-135M for a few steps, merges it in float32 and rounds the
weights that it changed in four ways. A figure is the KL of the answers to held-out orders, from those of base and
adapter apart in float32: of the merged model in float32, which is the rounding of the weights alone, and in bf16, as it
is used. What is larger than the change by the tuning itself has lost it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimtune
from benchmarks import machine
from benchmarks.prepare import model_folder
from slimtune.adapters.merge import compare_outputs
from slimtune.data.demo_orders import make_orders
from slimtune.slim.gptq import inverse_factor

BATCH, RATE, BLOCK = 4, 1e-3, 128
Rounding = Callable[[Tensor, Tensor], Tensor]


def nearest(weight_OI: Tensor, _: Tensor) -> Tensor:
    return weight_OI.bfloat16().float()


def stochastic(weight_OI: Tensor, _: Tensor) -> Tensor:
    """Up or down, with the chances that make the mean right."""
    # A float32 cut off after 16 bits is the bf16 below it: random lower bits added before carry over by chance.
    bits = weight_OI.contiguous().view(torch.int32)
    return ((bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)).view(torch.float32)


def carried(weight_OI: Tensor, _: Tensor) -> Tensor:
    """Each number with what rounding has left of those before it in its row: the sums of rows stay right."""
    rounded_OI, rest_O = torch.empty_like(weight_OI), torch.zeros(len(weight_OI))
    for column in range(weight_OI.shape[1]):
        wanted_O = weight_OI[:, column] + rest_O
        rounded_OI[:, column] = wanted_O.bfloat16().float()
        rest_O = wanted_O - rounded_OI[:, column]
    return rounded_OI


def by_inputs(weight_OI: Tensor, gram_II: Tensor) -> Tensor:
    """The error of each column made up for by those after it, so that products with the inputs stay near (GPTQ)."""
    width = len(gram_II)
    factor_II = inverse_factor(gram_II)
    left_OI, rounded_OI = weight_OI.clone(), torch.empty_like(weight_OI)
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        errors_OB = torch.zeros(len(weight_OI), end - start)
        for column in range(start, end):
            rounded_OI[:, column] = left_OI[:, column].bfloat16().float()
            error_O = (left_OI[:, column] - rounded_OI[:, column]) / factor_II[column, column]
            left_OI[:, column:end] -= error_O[:, None] * factor_II[column, column:end]
            errors_OB[:, column - start] = error_O
        left_OI[:, end:] -= errors_OB @ factor_II[start:end, end:]
    return rounded_OI


WAYS: dict[str, Rounding] = {
    "nearest": nearest,
    "stochastic": stochastic,
    "error carried along the row": carried,
    "error made up for by the inputs (GPTQ)": by_inputs,
}


def encoded(tokenizer: Any, examples: Any) -> dict[str, Tensor]:
    """A batch of conversations; what isn't padding counts."""
    texts = [tokenizer.apply_chat_template(example.messages(), tokenize=False) for example in examples]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@torch.no_grad()
def answers(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits[batch["attention_mask"].bool()]


def grams(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of each linear layer that has an adapter, the products of its inputs (I, I)."""
    held: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def add(_: Any, inputs: Any) -> None:
            rows_NI = inputs[0][batch["attention_mask"].bool()]
            held[name] = rows_NI.T @ rows_NI

        return add

    named = [(name, module) for name, module in model.named_modules() if name.endswith("_proj")]
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in named]
    answers(model, batch)
    for handle in handles:
        handle.remove()
    return held


def main(
    steps: Annotated[list[int] | None, typer.Option(help="Steps of training after which is merged; repeat.")] = None,
    held_out: Annotated[int, typer.Option(min=1, help="Orders to answer.")] = 12,
) -> None:
    """Train, merge, round, compare."""
    stops = sorted(steps or [1, 3, 10])
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder(), padding_side="right")
    train, asked = make_orders(640, held_out)
    question = encoded(tokenizer, asked)
    used = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.bfloat16).eval()
    model = copy.deepcopy(used).float()
    untouched = answers(model, question)
    model = slimtune.get_peft_model(model, slimtune.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    print(f"{machine.cpu_model()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    noise = compare_outputs(untouched, answers(used, question).float()).kl
    print(f"In float32 / in bf16, whose own noise is {noise:.1e} on the base.\n")
    print(f"| after steps | change by the tuning | {' | '.join(WAYS)} |\n|{'---|' * (len(WAYS) + 2)}")
    for step in range(1, stops[-1] + 1):
        batch = encoded(tokenizer, train[(step - 1) * BATCH : step * BATCH])
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in stops:
            apart = answers(model, question)
            inputs = grams(model, encoded(tokenizer, train[:16]))
            model.merge_adapter()
            merged = {name: model.get_submodule(name).weight.detach().clone() for name in inputs}
            cells = [f"{compare_outputs(apart, untouched).kl:.1e}"]
            for way in WAYS.values():
                for name, weight_OI in merged.items():
                    rounded_OI = way(weight_OI, inputs[name])
                    model.get_submodule(name).weight.data.copy_(rounded_OI)
                    used.get_submodule(name).weight.data.copy_(rounded_OI)
                kls = [compare_outputs(apart, answers(each, question).float()).kl for each in (model, used)]
                cells.append(" / ".join(f"{kl:.1e}" for kl in kls))
            for name, weight_OI in merged.items():
                model.get_submodule(name).weight.data.copy_(weight_OI)
            model.unmerge_adapter()
            print(f"| {step} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
