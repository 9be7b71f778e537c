"""What drawing answers takes, as grpo does before each step: an estimate, for tokens come one by one.

The prompts are read under the ledger as ever. The last token is reckoned: the cache of keys and values has grown to
prompt and answer, and the largest layer's is there twice while it grows.
"""

from __future__ import annotations

from typing import Any

import torch

from slimtune.plan.memory import Moment, Parts, Work

NOTE = "drawing the answers is an estimate: the prompts are simulated, the growing cache is reckoned"


def read_prompts(model: Any, rows: int, tokens: int) -> Any:
    """The cache after the prompts; call it without gradients."""
    ids = torch.ones(rows, tokens, dtype=torch.long)
    options = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **options).past_key_values


def layers_of(cache: Any) -> list[list[torch.Tensor]]:
    """The keys and values of each layer."""
    return [[t for t in (layer.keys, layer.values) if t is not None] for layer in cache.layers]


def last_token(lasting: Parts, cache: Any, prompt: int, answer: int, head: torch.Tensor) -> Moment:
    """The moment before the end: what lasts, the whole cache, and the logits of one token with what is drawn from."""
    layers = [sum(tensor.nbytes for tensor in layer) for layer in layers_of(cache)]
    rows = layers_of(cache)[0][0].shape[0]

    def grown(nbytes: int) -> int:
        return nbytes * (prompt + answer) // prompt

    # Keys and values are longer by turns; logits in float32, sorted and as probabilities.
    workspace = grown(max(layers)) // 2 + 3 * 4 * rows * head.shape[0]
    parts = Parts(**lasting.named() | {"activations": grown(sum(layers)), "workspace": workspace})
    return Moment("generation", "cache", "cat", parts)


def work_of(prompts: Work, lasting: Parts, cache: Any, prompt: int, answer: int, head: torch.Tensor) -> Work:
    """Of all tokens: each computes as one of the prompt does, and reads all weights and the cache so far."""
    layers = layers_of(cache)
    held = sum(tensor.nbytes for layer in layers for tensor in layer)
    flops = prompts.flops * (prompt + answer) // prompt + 2 * layers[0][0].shape[0] * answer * head.numel()
    mean = held * (2 * prompt + answer) // (2 * prompt)
    return Work(flops, prompts.bytes_moved + answer * (lasting.weights + lasting.adapter + mean))
