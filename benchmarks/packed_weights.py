"""Whether weights that are packed once make a frozen model's products faster: `python -m benchmarks.packed_weights`.

The products of SmolLM2's layers, y = x W^T forward and g W for the gradient of the input, in turns: torch's own, and
those of oneDNN and MKL with weights in their own layout. All layers' weights are read one after the other, as a model
reads them, so that none is in a cache still. Printed is how many times as fast each is, each the least of some rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.machine import cores, cpu_model, load, today

SHAPES = ((576, 576), (576, 576), (576, 192), (576, 192), (576, 1536), (576, 1536), (1536, 576))
"""Inputs and outputs: queries and the output projection, keys and values, gate and up, down."""
TORCH, ONEDNN, MKL = "torch", "oneDNN, packed", "MKL, packed"
DECODING, TRAINING = (1, 4, 16), (256, 1024)
Product = Callable[[Tensor], Tensor]


def products(weights: list[Tensor], tokens: int) -> dict[str, list[Product]]:
    """x (tokens, in) to (tokens, out) by each way, for weights (out, in) that are packed for so many tokens."""

    def by_onednn(weight: Tensor) -> Product:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    def by_mkl(weight: Tensor) -> Product:
        packed: Any = torch.ops.mkl._mkl_reorder_linear_weight(weight, tokens)
        return lambda x: torch.ops.mkl._mkl_linear(x, packed, weight, None, tokens)

    def plain(weight: Tensor) -> Product:
        return lambda x: torch.nn.functional.linear(x, weight)

    ways = {TORCH: [plain(each) for each in weights], ONEDNN: [by_onednn(each) for each in weights]}
    if torch.backends.mkl.is_available() and weights[0].dtype == torch.float32:
        ways[MKL] = [by_mkl(each) for each in weights]
    return ways


def transposed(weight: Tensor) -> Product:
    """g (tokens, out) to (tokens, in) with the weight (out, in) as it is."""
    return lambda g: g @ weight


def seconds(tokens: int, backward: bool, rounds: int, layers: int, dtype: torch.dtype) -> dict[str, float]:
    """By the clock, for all products of so many layers, by way."""
    weights = [torch.randn(o, i, dtype=dtype) for _ in range(layers) for i, o in SHAPES]
    # The gradient of the input is a product with the transposed weight, which is packed on its own.
    ways = products([each.T.contiguous() for each in weights] if backward else weights, tokens)
    if backward:
        ways[TORCH] = [transposed(each) for each in weights]
    widths = [o if backward else i for _ in range(layers) for i, o in SHAPES]
    given = {width: torch.randn(tokens, width, dtype=dtype) for width in set(widths)}
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            for product, width in zip(way, widths, strict=True):
                product(given[width])
            least[name] = min(least[name], time.perf_counter() - began)
    return least


@torch.inference_mode()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often all take turns.")] = 7,
    layers: Annotated[int, typer.Option(min=1, help="Layers whose weights are read in a round.")] = 30,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
) -> None:
    """Print a Markdown table.

    Example: python -m benchmarks.packed_weights --dtype float32
    """
    kind = getattr(torch, dtype)
    print(f"{cpu_model()}, {cores()} cores, load {load():.0f}; torch {torch.__version__}; {today()}; {dtype}\n")
    print(f"| tokens | | {TORCH} | {ONEDNN} | {MKL} |\n|---|---|---|---|---|")
    for tokens in (*DECODING, *TRAINING):
        for backward in (False, True) if tokens in TRAINING else (False,):
            taken = seconds(tokens, backward, rounds, layers, kind)
            ratios = [f"{taken[TORCH] / taken[name]:.2f}" if name in taken else "" for name in (ONEDNN, MKL)]
            direction = "backward" if backward else "forward"
            print(f"| {tokens:,} | {direction} | {1000 * taken[TORCH]:.0f} ms | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
