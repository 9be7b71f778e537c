"""TRL's own forward on an adopted model: nothing that is trained is passed by, and its head costs what it has to.

TRL puts a forward of its own on a model, which runs the layers itself and multiplies by the head's weight. It stands
before the model's own, so that what an adapter puts around the whole model (virtual tokens) and a head that is trained
whole would be left out of the loss and never be trained, without a word. There it is run inside instead.

On a processor TRL (1.16) multiplies the hidden states of the whole batch by the head, in the forward, once more in the
backward pass and for the gradient, and folds the logits by single operations of torch. Here the learned tokens alone
meet the head, once, and their gradient is there with them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from slimtune.adapters.adopt import frozen_forward
from slimtune.bases import base_of
from slimtune.core.frozen import deltas_of, standing_in
from slimtune.errors import ConfigError
from slimtune.ops.cross_entropy import IGNORED, TokenStatistics, chunked_log_probs


def is_from_trl(forward: Any) -> bool:
    """Whether TRL made this forward, by an argument that it gives it."""
    code = getattr(getattr(forward, "__func__", forward), "__code__", None)
    # By its argument, for it is made in a closure and has no name to be known by (TRL 1.16).
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


PER_TOKEN = TokenStatistics._fields
"""What TRL's forward gives of each token, in the order in which its kernel does."""
BY_TRITON = {"cuda", "xpu"}
"""Devices for which TRL has kernels in Triton, which fold logits in one pass."""
_COMPACT = frozenset(BY_TRITON)
"""Where TRL scores the learned tokens alone by itself."""


def on_learned_tokens(model: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """TRL's forward, whose head scores the tokens that are learned and no others on every device.

    What isn't learned gets 0, as from TRL.

    Args:
        model: whose layers it runs.
    """
    forward = _with_own_log_probs(forward)

    @functools.wraps(forward)
    def scored(
        *args: Any, fused_lm_head: bool = False, labels: Any = None, shift_labels: Any = None, **kwargs: Any
    ) -> Any:
        given = {"labels": labels, "shift_labels": shift_labels, "fused_lm_head": fused_lm_head}
        as_it_is = functools.partial(forward, *args, **kwargs, **{n: v for n, v in given.items() if v is not None})
        backbone = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
        targets = labels[:, 1:] if shift_labels is None and labels is not None else shift_labels
        if not fused_lm_head or backbone is None or targets is None:
            return as_it_is()
        learned = targets != IGNORED
        count = int(learned.sum())
        # Of a batch in which nothing is learned, the zeros have to hang together with the model.
        if targets.device.type in _COMPACT or not 0 < count < learned.numel():
            return as_it_is()

        def pick(module: nn.Module, args: Any, output: Any) -> Any:
            # (B, T, features) to (1, learned, features).
            states = output.last_hidden_state if shift_labels is not None else output.last_hidden_state[:, :-1]
            output["last_hidden_state"] = states[learned.to(states.device)][None]
            return output

        hook = backbone.register_forward_hook(pick)
        try:
            output = forward(*args, fused_lm_head=True, shift_labels=targets[learned][None], **kwargs)
        finally:
            hook.remove()
        for name in PER_TOKEN:
            if (values := getattr(output, name, None)) is not None:
                there = learned.to(values.device)
                setattr(output, name, values.new_zeros(there.shape).masked_scatter(there, values))
        output.label_mask = learned
        return output

    return scored


_KERNEL = "_ChunkedLogProbFunction"
"""The name by which TRL's forward finds what makes log-probabilities of hidden states."""
_KERNEL_TAKES = (
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
    "logit_scale", "outputs",
)  # fmt: skip


def _with_own_log_probs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """TRL's forward with `chunked_log_probs` in the place of its kernel, where that computes the same.

    It is a copy of the function that finds another kernel by that name; TRL's own stays as it is.
    """
    function: Any = getattr(forward, "__func__", forward)
    theirs = getattr(function, "__globals__", {}).get(_KERNEL)
    # TRL promises nothing of it, and other versions have others.
    if theirs is None or tuple(inspect.signature(theirs.forward).parameters) != _KERNEL_TAKES:
        return forward
    names = function.__globals__ | {_KERNEL: SimpleNamespace(apply=functools.partial(_log_probs, theirs.apply))}
    own = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(own, function)
    return MethodType(own, forward.__self__) if isinstance(forward, MethodType) else own


def _log_probs(
    theirs: Callable[..., Any], hidden: Any, weight: Any, bias: Any, targets: Any, temperature: float, chunk_size: int,
    softcap: float | None = None, logit_scale: float = 1.0, outputs: tuple[str, ...] = PER_TOKEN[1:],
) -> Any:  # fmt: skip
    """What TRL's kernel gives, by it or by ours."""
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    is_cast = hidden.dtype != weight.dtype or torch.is_autocast_enabled(hidden.device.type)
    if learns or is_cast or softcap is not None or hidden.device.type in BY_TRITON:
        return theirs(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs)
    return tuple(chunked_log_probs(hidden, weight, bias, targets, logit_scale / temperature, outputs))


def is_around(model: Any) -> bool:
    """Whether adapters do something around the whole model, or train its head whole."""
    return bool(deltas_of(model) or deltas_of(model.get_output_embeddings()))


def put_inside(model: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """TRL's forward for the inside of an adopted model, whose own it calls where nothing is fused."""
    own = functools.partial(frozen_forward(model), model)
    return functools.partial(_run_inside, model, own, forward)


def _run_inside(model: Any, own: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    adapter_state = vars(model).get("adapter_state")
    if adapter_state is None:  # the adapters are gone
        return forward(*args, **kwargs)
    head = model.get_output_embeddings()
    with adapter_state.using(inside=own), ExitStack() as stack:
        # TRL reads `head.weight` past the head's forward: the trained weight has to stand there meanwhile.
        for name in adapter_state.applied if kwargs.get("fused_lm_head") else ():
            if name in deltas_of(head):
                stack.enter_context(standing_in(head, deltas_of(head)[name].read_as(head)))
        return forward(*args, **kwargs)
