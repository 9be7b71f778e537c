"""The forward that TRL puts on a model: it runs the layers itself and multiplies by the head's weight.

It stands before the model's own, so that what an adapter puts around the whole model (virtual tokens) and a head that
is trained whole would be left out of the loss and never be trained, without a word. There it is run inside instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from slimtune.bases import base_of
from slimtune.core.delta import deltas_of, standing_in
from slimtune.errors import ConfigError


def is_fused(forward: Any) -> bool:
    """Whether it is such a forward, by an argument that TRL gives it."""
    code = getattr(getattr(forward, "__func__", forward), "__code__", None)
    return code is not None and "fused_lm_head" in code.co_varnames


def check_head(model: Any, otherwise: str = "") -> None:
    """See that the product with the head's weight is what the head computes.

    Args:
        otherwise: what else can be done about it.

    Raises:
        ConfigError: an adapter on the head, or one in few bits.
    """
    head = model.get_output_embeddings()
    if any(delta.read_as(head) is None for delta in deltas_of(head).values()):
        raise ConfigError(
            "TRL multiplies by the weight of the head itself, so that an adapter on the head would not be trained; "
            f"leave the head out of target_modules{otherwise}"
        )
    if base_of(head).kind != "linear" or not head.weight.is_floating_point():
        raise ConfigError(
            f"TRL multiplies by the head's weight, and this head is a {type(head).__name__} of {head.weight.dtype}; "
            f"load the model with its head in 16 bits{otherwise}"
        )


def is_around(model: Any) -> bool:
    """Whether adapters do something around the whole model, or train its head whole."""
    return bool(deltas_of(model) or deltas_of(model.get_output_embeddings()))


def put_inside(model: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Such a forward for the inside of an adopted model, whose own it calls where nothing is fused."""
    own = vars(model).get("instance_forward") or functools.partial(type(model).adopted_from.forward, model)
    return functools.partial(_run_inside, model, own, forward)


def _run_inside(model: Any, own: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    adapter_state = vars(model).get("adapter_state")
    if adapter_state is None:  # the adapters are gone
        return forward(*args, **kwargs)
    head = model.get_output_embeddings()
    with adapter_state.using(inside=own), ExitStack() as stack:
        for name in adapter_state.applied if kwargs.get("fused_lm_head") else ():
            if name in deltas_of(head):
                stack.enter_context(standing_in(head, deltas_of(head)[name].read_as(head)))
        return forward(*args, **kwargs)
