"""Keys and values of many sequences in fixed slots, read by an attention that the model's own layers call.

All tokens of a step are one packed row (1, T): first one token of each decoding slot, then pieces of prompts. The
layers see a batch of one, so that every product runs over all tokens at once; the attention alone knows which token
belongs to which slot. It is registered with transformers by name, and no model is rewritten for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from slimtune.errors import ConfigError

ATTENTION = "slimtune_slots"
"""The name under which transformers finds the attention."""


@dataclass(frozen=True)
class Piece:
    """Tokens of one slot that lie behind each other: positions start to start + length - 1."""

    slot: int
    start: int
    length: int


class KeyValueSlots:
    """The memory of all slots, allocated once: per layer keys and values of (slots, heads, context, head_dim)."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], slots: int, context: int, like: Tensor) -> None:
        made: Any = {"dtype": like.dtype, "device": like.device}
        # Written to, so that the memory is really there: pages of zeros that nothing touched would come later.
        self.keys = [torch.empty(slots, heads, context, width, **made).zero_() for heads, width, _ in shapes]
        self.values = [torch.empty(slots, heads, context, width, **made).zero_() for heads, _, width in shapes]
        self.slots, self.context = slots, context

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a slot begin as another one does."""
        for tensor in (*self.keys, *self.values):
            # (heads, length, head_dim) a layer: a copy on the device, far cheaper than reading the tokens again.
            tensor[target, :, :length] = tensor[source, :, :length]

    def clear_unless_finite(self, slot: int, length: int) -> bool:
        """Zeros in a slot whose numbers aren't finite; gives back whether they are.

        A later sequence masks what it hasn't written over, and zero times infinity is NaN. The last layer shows
        it: what isn't finite in one layer makes keys and values of all behind it so.
        """
        last = (self.keys[-1][slot, :, :length], self.values[-1][slot, :, :length])
        is_finite = all(bool(tensor.isfinite().all()) for tensor in last)
        for tensor in () if is_finite else (*self.keys, *self.values):
            tensor[slot].zero_()
        return is_finite

    def write(self, slot: int, layer: int, keys_HND: Tensor, values_HND: Tensor) -> None:
        """Put keys and values at the start of a slot."""
        self.keys[layer][slot, :, : keys_HND.shape[1]] = keys_HND
        self.values[layer][slot, :, : values_HND.shape[1]] = values_HND


@dataclass
class Step:
    """One forward over the packed tokens of several slots.

    Attributes:
        decoding: a piece of one token for each decoding slot; they come first.
        prompts: pieces of prompts, behind them.
        layers: how many layers have called the attention.
    """

    memory: KeyValueSlots
    decoding: Sequence[Piece]
    prompts: Sequence[Piece]
    layers: int = 0
    _masks: dict[tuple[int, int | None, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.memory.keys[0].device
        pieces = [*self.decoding, *self.prompts]
        positions = [p.start + i for p in pieces for i in range(p.length)]
        self.position_T = torch.tensor(positions, device=device)
        self.slot_T = torch.tensor([p.slot for p in pieces for _ in range(p.length)], device=device)
        # Decoding reads a span of slots as one view; those in it that don't decode compute what nobody reads.
        self.first = min((p.slot for p in self.decoding), default=0)
        self.span = max((p.slot for p in self.decoding), default=-1) + 1 - self.first
        self.is_whole_span = [p.slot for p in self.decoding] == [*range(self.first, self.first + self.span)]
        self.decoding_B = self.slot_T[: len(self.decoding)] - self.first
        self.longest = max((p.start + 1 for p in self.decoding), default=0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the model's layers run this step."""
        token = _step.set(self)
        try:
            yield
        finally:
            _step.reset(token)

    def attend(self, layer: int, query_HTD: Tensor, scale: float | None, window: int | None) -> Tensor:
        """The attention of all tokens over their own slots, (T, heads, head_dim)."""
        keys, values = self.memory.keys[layer], self.memory.values[layer]
        count = len(self.decoding)
        outputs = []
        if count:
            # A slice and not an index: `keys[[0, 2, 3]]` would copy all keys of these slots at each layer of each step.
            own = slice(self.first, self.first + self.span)
            rows_BHD = query_HTD[:, :count].transpose(0, 1)
            if not self.is_whole_span:
                rows_BHD = rows_BHD.new_zeros(self.span, *rows_BHD.shape[1:]).index_copy_(0, self.decoding_B, rows_BHD)
            k, v = keys[own, :, : self.longest], values[own, :, : self.longest]
            y_BHD = _attention(rows_BHD[:, :, None], k, v, self._decoding_mask(window), scale)[:, :, 0]
            outputs.append(y_BHD if self.is_whole_span else y_BHD.index_select(0, self.decoding_B))
        for index, piece in enumerate(self.prompts):
            end = piece.start + piece.length
            # (1, G, end, D), a view: prompts are attended to one by one, for their lengths differ.
            k, v = keys[piece.slot, None, :, :end], values[piece.slot, None, :, :end]
            q = query_HTD[None, :, count : count + piece.length]
            shared = query_HTD.shape[0] // keys.shape[1]
            y_HTD = _attention(q, k, v, self._prompt_mask(index, piece, window, shared), scale)[0]
            outputs.append(y_HTD.transpose(0, 1))
            count += piece.length
        return torch.cat(outputs)

    def _decoding_mask(self, window: int | None) -> Tensor:
        """(slots of the span, 1, 1, longest): what each slot's one token sees."""
        # The mask is the same in all layers with one window; -1 stands for the decoding rows, 0 and up for pieces.
        if (-1, window, 1) not in self._masks:
            device = self.position_T.device
            # A slot that doesn't decode sees its first key: the mean over no keys at all is NaN.
            last_B = torch.zeros(self.span, dtype=torch.long, device=device)
            last_B[self.decoding_B] = self.position_T[: len(self.decoding)]
            self._masks[-1, window, 1] = self._summand(_sees(last_B[:, None], self.longest, window)[:, None])
        return self._masks[-1, window, 1]

    def _prompt_mask(self, index: int, piece: Piece, window: int | None, shared: int) -> Tensor:
        """(1, 1, shared * length, end): each token sees those before it and itself, in each head of a key head."""
        if (index, window, shared) not in self._masks:
            position_T = torch.arange(piece.start, piece.start + piece.length, device=self.position_T.device)
            sees_TS = _sees(position_T, piece.start + piece.length, window)
            # Row h * T + t of the joined heads is head h's token t, and sees what token t sees.
            self._masks[index, window, shared] = self._summand(sees_TS.repeat(shared, 1)[None, None])
        return self._masks[index, window, shared]

    def _summand(self, sees: Tensor) -> Tensor:
        """Zero where a key is seen, and minus infinity elsewhere: of booleans each layer would make these anew."""
        return torch.zeros_like(sees, dtype=self.memory.keys[0].dtype).masked_fill_(~sees, -torch.inf)


_step: ContextVar[Step] = ContextVar("step")


def _sees(position: Tensor, length: int, window: int | None) -> Tensor:
    """Which of `length` keys are at or before each position, in its window where there is one; (..., length)."""
    distance = position[..., None] - torch.arange(length, device=position.device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _attention(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """softmax(q k^T) v, the H / G heads that share a key head side by side as rows of one."""
    rows, heads, length, _ = q_BHTD.shape
    groups = k_BGSD.shape[1]
    # (rows, G, H / G * T, D): without a copy of the keys for each head, which would be most of the work in decoding.
    q = q_BHTD.reshape(rows, groups, heads // groups * length, -1)
    y = F.scaled_dot_product_attention(q, k_BGSD, v_BGSD, attn_mask=mask, scale=scale)
    return y.reshape(rows, heads, length, -1)


def _slot_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As transformers calls an attention: q, k, v (1, heads, T, head_dim) to (1, T, heads, head_dim)."""
    step = _step.get(None)
    if step is None:
        raise ConfigError("the model is run by an engine, which answers through submit() or generate(); stop it first")
    if softcap is not None or s_aux is not None or kwargs.get("position_bias") is not None:
        raise ConfigError(
            f"the attention of this model, a {type(module).__name__}, caps its scores or adds to them, which the "
            "engine's does not; use model.generate()"
        )
    memory, layer = step.memory, module.layer_idx
    # Advanced indices on both sides of a slice come out in front: (T, heads, head_dim), hence the transposed keys.
    memory.keys[layer][step.slot_T, :, step.position_T] = key[0].transpose(0, 1)
    memory.values[layer][step.slot_T, :, step.position_T] = value[0].transpose(0, 1)
    step.layers += 1
    return step.attend(layer, query[0], scaling, sliding_window)[None], None


AttentionInterface.register(ATTENTION, _slot_attention)
