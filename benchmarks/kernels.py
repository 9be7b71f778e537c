"""Kernels of a training step on a processor, beside those that they stand in for: `python -m benchmarks.kernels`.

- The gradient of one layer's attention in bf16, by torch's kernel and within `slimtune.short_attention`.
- Log-probabilities, entropy, top-1 and the gradient of the hidden states, of SmolLM2's output layer: TRL's kernel,
  which forms the logits of each chunk in the forward and again in the backward pass, and slimtune's.
- Products in float32: MKL's, and oneDNN's with reduced precision allowed, with the error of each.

Milliseconds, medians of rounds in turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

import slimtune
from benchmarks.machine import cores, cpu_model, installed, load, today
from slimtune.ops.cross_entropy import TokenStatistics, chunked_log_probs

ATTENTIONS = (
    (8, 9, 25, 60, 64), (8, 9, 54, 79, 64), (8, 9, 128, 128, 64), (4, 9, 256, 256, 64), (2, 9, 384, 384, 64),
    (2, 9, 512, 512, 64), (4, 16, 128, 128, 128),
)  # fmt: skip
"""Rows, heads, queries, keys and width of a head."""
HEADS = (128, 454, 1024)
"""Learned tokens of a batch."""
WIDTH, VOCABULARY = 576, 49_152
TRL_CHUNK = 32_768
"""Entries of the vocabulary that TRL takes at once."""
PRODUCTS = ((64, 576, 1536), (256, 576, 1536), (1024, 576, 1536), (256, 2048, 8192))
"""Tokens, inputs and outputs."""


def in_turns(ways: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Milliseconds of each."""
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for way, seen in zip(ways, taken, strict=True):
            began = time.perf_counter()
            way()
            seen.append(1000 * (time.perf_counter() - began))
    return [median(seen[1:]) for seen in taken]  # the first one warms up


def attention(shape: tuple[int, int, int, int, int], rounds: int) -> list[float]:
    """The gradient of queries (B, H, L, D), keys and values (B, H, S, D): torch's, slimtune's."""
    rows, heads, queries, keys, width = shape
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1, training=True)
    # As the layers of a model have them: (B, L, H, D), transposed.
    qkv = [torch.randn(rows, n, heads, width).bfloat16().transpose(1, 2) for n in (queries, keys, keys)]
    # Behind a shared beginning each query sees the keys before it; a text by itself needs no mask.
    sees = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    mask = None if queries == keys else sees.expand(rows, 1, -1, -1)
    ways = []
    for within in (nullcontext, slimtune.short_attention):
        inputs = [each.detach().requires_grad_() for each in qkv]
        with within():
            output = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *inputs, mask)[0]
        gradient = torch.randn_like(output)
        # The graph is bound by the default, not by the loop.
        ways.append(lambda o=output, i=inputs, g=gradient: torch.autograd.grad(o, i, g, retain_graph=True))
    return in_turns(ways, rounds)


def head(tokens: int, rounds: int) -> list[float]:
    """Forward and gradient of hidden states (tokens, width): TRL's, slimtune's."""
    hidden = torch.randn(tokens, WIDTH).bfloat16().requires_grad_()
    weight, targets = (0.1 * torch.randn(VOCABULARY, WIDTH)).bfloat16(), torch.randint(0, VOCABULARY, (tokens,))
    gradient = torch.randn(tokens)
    names = tuple(name for name in TokenStatistics._fields if name in ("log_probs", "entropy", "is_top1"))

    def theirs() -> Any:
        found = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, names)
        return torch.autograd.grad(found[0], hidden, gradient)  # pyright: ignore[reportOptionalSubscript]

    def ours() -> Any:
        return torch.autograd.grad(chunked_log_probs(hidden, weight, None, targets, 1.0, names)[0], hidden, gradient)

    return in_turns([theirs, ours], rounds)


def product(shape: tuple[int, int, int], rounds: int) -> tuple[list[float], list[float]]:
    """x W^T in float32, (tokens, in) to (tokens, out), by MKL and by oneDNN, with the largest error of each."""
    tokens, inputs, outputs = shape
    x_TI, weight_OI = torch.randn(tokens, inputs), torch.randn(outputs, inputs)
    exact_TO = x_TI.double() @ weight_OI.double().t()
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision

    def computed(precision: str) -> Tensor:
        settings.fp32_precision = precision  # pyright: ignore[reportAttributeAccessIssue]
        return x_TI @ weight_OI.t()

    try:
        ways = [lambda: computed("none"), lambda: computed("bf16")]
        errors = [float((way() - exact_TO).abs().max() / exact_TO.abs().max()) for way in ways]
        return in_turns(ways, rounds), errors
    finally:
        settings.fp32_precision = before  # pyright: ignore[reportAttributeAccessIssue]


def main(rounds: Annotated[int, typer.Option(min=1, help="How often all take turns.")] = 15) -> None:
    """Print three Markdown tables.

    Example: python -m benchmarks.kernels --rounds 5
    """
    versions = ", ".join(f"{package} {installed(package)}" for package in ("torch", "transformers", "trl"))
    print(f"{cpu_model()}, {cores()} cores, load {load():.0f}; {versions}; {today()}\n")
    print("| rows, heads, queries, keys, width | in bf16 | in float32, there and back |\n|---|---|---|")
    for shape in ATTENTIONS:
        print(f"| {', '.join(map(str, shape))} | {' | '.join(f'{ms:.1f}' for ms in attention(shape, rounds))} |")
    print("\n| learned tokens | TRL's kernel | slimtune's |\n|---|---|---|")
    for tokens in HEADS:
        print(f"| {tokens:,} | {' | '.join(f'{ms:.0f}' for ms in head(tokens, rounds))} |", flush=True)
    print("\n| tokens, inputs, outputs | MKL | oneDNN | error of MKL | of oneDNN |\n|---|---|---|---|---|")
    for shape in PRODUCTS:
        taken, errors = product(shape, rounds)
        cells = [f"{ms:.2f}" for ms in taken] + [f"{error:.1e}" for error in errors]
        print(f"| {', '.join(map(str, shape))} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
