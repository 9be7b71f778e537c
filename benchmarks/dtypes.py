"""bf16 beside float32 on this processor: the ratios by which `auto` chooses (docs/adr/0024-computing-dtype.md).

`python -m benchmarks.dtypes` has SmolLM2-135M read a prompt, write tokens one after the other and take a training step
of LoRA, on bases of several kinds, with each of both dtypes in turn. Seconds are the processor's, so that other work on
the machine counts for little.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Annotated, Any

import torch
import typer

import slimtune
from benchmarks import machine

DTYPES, MODEL = ("bfloat16", "float32"), "smollm2-135m-instruct"
PROMPT, ANSWER, BATCH = 32, 8, 1


def seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def answering(model: Any) -> dict[str, float]:
    """Of the processor, by token that is read and by token that is written."""
    ids = torch.randint(5, 200, (1, PROMPT))

    def write(tokens: int) -> Any:
        return model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    with torch.inference_mode():
        # The first answer puts codes into the order of their kernel.
        write(2)
        first, whole = seconds(lambda: write(1)), seconds(lambda: write(1 + ANSWER))
    return {"a token read": first / PROMPT, "a token written": (whole - first) / ANSWER}


def training(model: Any) -> dict[str, float]:
    """Of the processor, forward and backward of one step."""
    ids = torch.randint(5, 200, (BATCH, PROMPT))
    model = slimtune.get_peft_model(model.train(), slimtune.LoraConfig(task_type="CAUSAL_LM"))
    losses: list[Any] = []
    forward = seconds(lambda: losses.append(model(input_ids=ids, labels=ids).loss))
    return {"a step forward": forward, "a step backward": seconds(losses[0].backward)}


def main(
    base: Annotated[list[str], typer.Option(help="dense, nf4, int8 or int4; repeatable.")] = [  # noqa: B006
        "dense",
        "nf4",
        "int8",
        "int4",
    ],
    rounds: Annotated[int, typer.Option(min=1, help="How often both dtypes have their turn.")] = 3,
) -> None:
    """Print how many times longer bf16 takes than float32."""
    threads = torch.get_num_threads()
    for kind in base:
        took: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for dtype in DTYPES * rounds:
            quantize = None if kind == "dense" else kind
            model, _ = slimtune.load(MODEL, dtype=dtype, device="cpu", quantize=quantize)
            for name, value in (answering(model.eval()) | training(model)).items():
                took[name][dtype].append(value)
        ratios = {name: median(of["bfloat16"]) / median(of["float32"]) for name, of in took.items()}
        print(f"{kind}: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()), flush=True)
    print(
        f"seconds of the processor in bf16 over those in float32; {machine.cpu_model()}, {threads} threads, torch "
        f"{torch.__version__}, {machine.today()}"
    )


if __name__ == "__main__":
    typer.run(main)
