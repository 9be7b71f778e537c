"""Batches of an encoder-decoder in which a prompt stands several times, each with a target: it is encoded once."""

from __future__ import annotations

import inspect
import threading
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

    Left as they are: passes with embeddings in place of tokens, or with hidden states or attention weights asked for,
    with adapters by row, or with another tensor of each row, such as a mask of global attention.

    Args:
        tokens: the `SharedTokens` to count into.
    """
    encoder = model.get_encoder()
    signature = inspect.signature(encoder.forward)
    # By thread, of which several may run one model; a dictionary, so that a model can be copied meanwhile.
    pending: dict[int, Tensor] = {}

    def once(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pending.pop(threading.get_ident(), None)
        bound = signature.bind(*args, **kwargs).arguments
        given = {**bound.pop("kwargs", {}), **bound}
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is None or ids.dim() != 2 or (mask is not None and mask.dim() != 2) or is_traced():
            return None
        if given.get("inputs_embeds") is not None or any(given.get(name) for name in _ASKED):
            return None
        state = vars(model).get("adapter_state")
        by_row = (x for name, x in given.items() if name not in ("input_ids", "attention_mask"))
        if (state is not None and state.call.rows is not None) or any(isinstance(x, Tensor) for x in by_row):
            # Adapters by row, or something else that is told of each.
            return None
        firsts, numbers = distinct_rows(ids, mask)
        tokens.given += ids.numel()
        tokens.computed += len(firsts) * ids.shape[1]
        if len(firsts) == len(ids):
            return None
        pending[threading.get_ident()] = numbers
        return (), given | {
            name: x[firsts] for name, x in (("input_ids", ids), ("attention_mask", mask)) if x is not None
        }

    def to_all(encoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        numbers = pending.pop(threading.get_ident(), None)
        if numbers is None:
            return output
        # (U, T, features) to (B, T, features).
        states = output[0].index_select(0, numbers)
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
