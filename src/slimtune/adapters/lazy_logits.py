"""Logits that are computed only if somebody looks at them.

A model in training hands its logits to a loss and to nobody else. An adopted output layer therefore returns a
`LazyLogits`: reshaping and casting keep it lazy, `F.cross_entropy` on it runs in chunks, and any other use makes it
the real tensor. So no model's forward needs to be known, and none can come out wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimtune.bases import base_of
from slimtune.core.frozen import deltas_of
from slimtune.ops.autograd import is_traced
from slimtune.ops.cross_entropy import chunked_cross_entropy
from slimtune.ops.lazy import Lazy, real


class LazyLogits(Lazy):
    """`head(hidden)`, not computed yet.

    Args:
        hidden: (..., features).
        head: the adopted output layer.
        compute: what turns the hidden state into logits.
        dtype: the dtype that the logits were cast to, or None for the head's own.
    """

    def __init__(self, hidden: Tensor, head: Any, compute: Callable[[Tensor], Tensor], dtype: Any = None) -> None:
        self._hidden, self._head, self._compute, self._dtype = hidden, head, compute, dtype

    def computed(self) -> Tensor:
        logits = self._compute(self._hidden)
        return logits if self._dtype is None else logits.to(self._dtype)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._hidden.shape[:-1], self._vocabulary))

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype or self._hidden.dtype

    @property
    def _vocabulary(self) -> int:
        return base_of(self._head).features(self._head)[1]

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self._hidden.dim()

    def _lazily(self, hidden: Tensor, dtype: torch.dtype | None = None) -> LazyLogits:
        return LazyLogits(hidden, self._head, self._compute, dtype or self._dtype)

    def float(self) -> LazyLogits:
        return self._lazily(self._hidden, torch.float32)

    def contiguous(self) -> LazyLogits:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            if args[0] == self.device:
                return self
            if isinstance(args[0], torch.dtype):
                return self._lazily(self._hidden, args[0])
        return self.tensor().to(*args, **kwargs)

    def view(self, *shape: Any) -> Any:
        return self.reshape(*shape)

    def reshape(self, *shape: Any) -> Any:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        # A reshape that leaves the last axis alone is one of the hidden state: (..., V) follows from (..., features).
        if len(sizes) >= 1 and sizes[-1] == self._vocabulary:
            return self._lazily(self._hidden.reshape(*sizes[:-1], self._hidden.shape[-1]))
        return self.tensor().reshape(sizes)

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        # `logits[..., :-1, :]`, transformers' shift of a causal loss, is the case that matters.
        whole_rows = parts[-1] == slice(None) and (Ellipsis in parts[:-1] or len(parts) == self.dim())
        if all(isinstance(part, slice) or part is Ellipsis for part in parts) and whole_rows:
            return self._lazily(self._hidden[index])
        return self.tensor()[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is F.cross_entropy and isinstance(args[0], cls):
            loss = args[0]._cross_entropy(*args[1:], **dict(kwargs or {}))
            if loss is not None:
                return loss
        return super().__torch_function__(func, types, args, kwargs)

    def _cross_entropy(self, target: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        reduction, ignore_index = kwargs.pop("reduction", "mean"), kwargs.pop("ignore_index", -100)
        smoothed = kwargs.pop("label_smoothing", 0.0)
        # Class weights, smoothing, soft targets: rare in fine-tuning, and the real logits are right for all of them.
        unusual = args or smoothed or any(value is not None for value in kwargs.values())
        if unusual or reduction not in ("mean", "sum") or target.is_floating_point():
            return None
        if self.dim() != 2 or target.dim() != 1 or not _is_plain_frozen(self._head):
            return None
        # A compiler may trace this part of a forward that it gave up on; torch 2.11 loses what the node fills in.
        if is_traced():
            return None
        # (vocabulary, features), read here and not when the logits were made: a lazily moved weight is at hand now.
        weight, bias = base_of(self._head).weight(self._head), self._head.bias
        return chunked_cross_entropy(self._hidden, weight, bias, target, ignore_index, reduction)


def lazy_head(model: Any) -> Any:
    """The adopted output layer of a model in training, where its logits may stay uncomputed; else None."""
    ready = model.training and torch.is_grad_enabled() and not model.adapter_state.return_logits
    if not ready or is_traced() or not hasattr(model, "get_output_embeddings"):
        return None
    head = model.get_output_embeddings()
    # A head that is moved or gathered around its call has its weight at hand only during that call.
    around_its_call = hasattr(head, "unshard") or "instance_forward" in getattr(head, "__dict__", {})
    return head if hasattr(head, "adapter_state") and not around_its_call else None


def without_lazy(outputs: Any) -> Any:
    """A model's outputs without their lazy logits; where the outputs are a tuple, with the real ones."""
    if isinstance(outputs, tuple):
        return tuple(real(value) for value in outputs)
    if not any(isinstance(value, LazyLogits) for value in outputs.values()):
        return outputs
    return type(outputs)(**{key: value for key, value in outputs.items() if not isinstance(value, LazyLogits)})


def _is_plain_frozen(head: Any) -> bool:
    """Whether the head is a product with a frozen weight and nothing else."""
    deltas_in_effect = any(name in deltas_of(head) for name in head.adapter_state.applied)
    frozen = not any(parameter.requires_grad for parameter in head.parameters(recurse=False))
    base = base_of(head)
    return frozen and not deltas_in_effect and base.kind == "linear" and base.may_fuse(head)
