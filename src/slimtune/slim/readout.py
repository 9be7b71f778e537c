"""The last hidden states of a model that writes text, apart from the head that makes logits of them.

A model's forward is run as it is, with whatever adapters put around it; only its head is given a single position
meanwhile, so that the logits of all are never computed. What the model does to them afterwards is read from its config
and compared with what it really did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from slimtune.errors import ConfigError

_CHECKED: WeakSet[Any] = WeakSet()
"""Models whose logits are known to be those of their head."""


@dataclass(frozen=True)
class Readout:
    """Hidden states in front of a head.

    Attributes:
        hidden: (N, features) or (B, T, features).
        head: from hidden states to logits, (..., V).
        parameters: those of the head that are trained.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...] = ()

    def at(self, places: Tensor) -> Readout:
        """Those at some places alone, (N, features); `places` is a mask (B, T)."""
        return replace(self, hidden=self.hidden[places])

    def logits(self, rows: slice) -> Tensor:
        """The logits of some rows, without a gradient."""
        with torch.no_grad():
            return self.head(self.hidden[rows])


def width_of(model: Any) -> int:
    """How many tokens it has logits for."""
    return int(model.get_output_embeddings().weight.shape[0])


def read_out(model: Any, inputs: Mapping[str, Any]) -> Readout:
    """The last hidden states that the model has for its inputs, (B, T, features), and its head.

    Raises:
        ConfigError: a model without a head over its vocabulary, or one that changes its logits in an unknown way.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ConfigError(f"a {type(model).__name__} has no output layer over a vocabulary; distil a model with one")
    seen: list[tuple[Tensor, AbstractContextManager[Any]]] = []

    def keep_last(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append((args[0], _autocast_like_here(args[0].device.type)))
        return (args[0][:, -1:], *args[1:])

    handle = head.register_forward_pre_hook(keep_last)
    try:
        logits_B1V = model(**{**inputs, "use_cache": False}).logits
    finally:
        handle.remove()
    if not seen:
        raise ConfigError(f"a {type(model).__name__} makes its logits without its output layer; it can't be distilled")
    hidden_BTD, autocast = seen[-1]
    change = _change_of(model)

    def logits_of(hidden: Tensor) -> Tensor:
        with autocast:
            return change(head(hidden))

    _check_same(model, logits_of, hidden_BTD, logits_B1V)
    trained = tuple(parameter for parameter in head.parameters() if parameter.requires_grad)
    # Virtual tokens stand in front.
    return Readout(hidden_BTD[:, -inputs["input_ids"].shape[1] :], logits_of, trained)


def _autocast_like_here(device: str) -> AbstractContextManager[Any]:
    """The autocast of the head's own call: a full tuning computes in bf16, but only within the model's forward."""
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


def _change_of(model: Any) -> Callable[[Tensor], Tensor]:
    """What the model does to its logits behind the head, by its config."""
    config = model.config.get_text_config()
    # Cohere multiplies, Granite divides, Gemma 2 and 3 bend.
    factor = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)

    def change(logits: Tensor) -> Tensor:
        logits = logits if factor == 1 else logits * factor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return change


@torch.no_grad()
def _check_same(model: Any, logits_of: Callable[[Tensor], Tensor], hidden_BTD: Tensor, own_B1V: Tensor) -> None:
    """Raises: ConfigError, where the model's own logits aren't those of its head."""
    if model in _CHECKED:
        return
    again = logits_of(hidden_BTD[:, -1:]).float()
    if not torch.allclose(again, own_B1V.float(), rtol=0.02, atol=0.02 * float(own_B1V.abs().amax())):
        raise ConfigError(
            f"a {type(model).__name__} changes its logits behind its output layer in a way that is not known here, so "
            "that its distribution can't be computed in parts; distil it by its written answers (--seq-kd)"
        )
    _CHECKED.add(model)
