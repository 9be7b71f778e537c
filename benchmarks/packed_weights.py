"""Whether weights that are packed once make a frozen model's products faster: `python -m benchmarks.packed_weights`.

The products of SmolLM2's layers in float32 on one core, y = x W^T forward and g W for the gradient of the input, in
turns: torch's own, and those of oneDNN and MKL with weights in their own layout. Printed is how many times as fast each
is, of the sum over the layers' shapes, each the least of some rounds of the processor's seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import typer
from torch import Tensor

from benchmarks.machine import cpu_model, load, today

SHAPES = ((576, 576), (576, 192), (576, 1536), (1536, 576))
"""Inputs and outputs: queries and the output projection, keys and values, gate and up, down."""
Product = Callable[[Tensor], Tensor]


def products(weight: Tensor, tokens: int) -> dict[str, Product]:
    """x (tokens, in) to (tokens, out) by each way, with the weight (out, in) packed for so many tokens."""
    by_onednn = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
    ways: dict[str, Product] = {
        "torch": lambda x: torch.nn.functional.linear(x, weight),
        "oneDNN, packed": lambda x: torch.ops.mkldnn._linear_pointwise(x, by_onednn, None, "none", [], ""),
    }
    if torch.backends.mkl.is_available():
        by_mkl: Any = torch.ops.mkl._mkl_reorder_linear_weight(weight, tokens)
        ways["MKL, packed"] = lambda x: torch.ops.mkl._mkl_linear(x, by_mkl, weight, None, tokens)
    return ways


def seconds(tokens: int, backward: bool, rounds: int) -> dict[str, float]:
    """The processor's seconds of all shapes, by way."""
    taken: dict[str, float] = {}
    for inputs, outputs in SHAPES:
        weight, read = torch.randn(outputs, inputs), outputs if backward else inputs
        # The gradient of the input is a product with the transposed weight, which is packed on its own.
        ways = products(weight.T.contiguous() if backward else weight, tokens)
        if backward:
            ways["torch"] = lambda g, weight=weight: g @ weight
        given = torch.randn(tokens, read)
        least = dict.fromkeys(ways, float("inf"))
        for _ in range(rounds):
            for name, way in ways.items():
                way(given)
                began = time.process_time()
                for _ in range(4):
                    way(given)
                least[name] = min(least[name], (time.process_time() - began) / 4)
        taken = {name: taken.get(name, 0.0) + each for name, each in least.items()}
    return taken


def main(rounds: int = 7) -> None:
    """Print a Markdown table."""
    torch.set_num_threads(1)
    print(f"{cpu_model()}, one core, load {load():.0f}; torch {torch.__version__}; {today()}\n")
    print("| tokens | | torch | oneDNN, packed | MKL, packed |\n|---|---|---|---|---|")
    for tokens in (256, 1024):
        for backward in (False, True):
            taken = seconds(tokens, backward, rounds)
            ratios = [f"{taken['torch'] / taken[name]:.2f}" for name in list(taken)[1:]]
            direction = "backward" if backward else "forward"
            print(f"| {tokens:,} | {direction} | {1000 * taken['torch']:.0f} ms | {' | '.join(ratios)} |")


if __name__ == "__main__":
    typer.run(main)
