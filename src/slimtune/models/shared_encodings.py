"""Batches of an encoder-decoder in which a prompt stands several times, each with a target: it is encoded once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.ops.autograd import is_traced


def distinct_rows(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The first row of each kind, (U,), and the kind of each row, (B,); padding makes no difference.

    Args:
        input_ids: (B, T).
        attention_mask: (B, T), 0 at padding; None where a row has none.
    """
    kinds: dict[Any, int] = {}
    ids = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -1)
    numbers = [kinds.setdefault(tuple(row), len(kinds)) for row in ids.tolist()]
    firsts = [numbers.index(kind) for kind in range(len(kinds))]
    return torch.tensor(firsts, device=input_ids.device), torch.tensor(numbers, device=input_ids.device)


@contextmanager
def shared_encodings(model: Any, tokens: Any) -> Iterator[None]:
    """Within it, the encoder reads equal rows of a batch once, and gives their states to each; gradients add up.

    Left as they are: passes with embeddings in place of tokens, or with hidden states or attention weights asked for.

    Args:
        tokens: the `SharedTokens` to count into.
    """
    encoder = model.get_encoder()
    signature = inspect.signature(encoder.forward)
    pending: list[Tensor] = []

    def once(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pending.clear()
        bound = signature.bind(*args, **kwargs).arguments
        given = {**bound.pop("kwargs", {}), **bound}
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is None or ids.dim() != 2 or (mask is not None and mask.dim() != 2) or is_traced():
            return None
        if given.get("inputs_embeds") is not None or any(given.get(name) for name in _ASKED):
            return None
        firsts, numbers = distinct_rows(ids, mask)
        tokens.given += ids.numel()
        tokens.computed += len(firsts) * ids.shape[1]
        if len(firsts) == len(ids):
            return None
        pending.append(numbers)
        return (), given | {
            name: x[firsts] for name, x in (("input_ids", ids), ("attention_mask", mask)) if x is not None
        }

    def to_all(encoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not pending:
            return output
        # (U, T, features) to (B, T, features).
        states = output[0].index_select(0, pending.pop())
        if isinstance(output, tuple):
            return (states, *output[1:])
        output["last_hidden_state"] = states
        return output

    hooks = [encoder.register_forward_pre_hook(once, with_kwargs=True), encoder.register_forward_hook(to_all)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


_ASKED = ("output_hidden_states", "output_attentions")
