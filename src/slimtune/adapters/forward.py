"""How a model that carries adapters is called: its loss in chunks, and rows of a batch under adapters of their own.

TRL puts a forward of its own on a model, which runs the layers itself and multiplies by the head's weight. It stands
before the model's own, so that what an adapter puts around the whole model (virtual tokens) and a head that is trained
whole would be left out of the loss and never be trained, without a word. There it is run inside instead.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.adapters.adopt import adopt_head, frozen_forward, run
from slimtune.adapters.embeddings import token_embeddings
from slimtune.adapters.lazy_logits import lazy_head, without_lazy
from slimtune.adapters.rows import BASE, RowAdapters
from slimtune.bases import base_of
from slimtune.core.frozen import deltas_of, standing_in
from slimtune.core.roles import recomputes
from slimtune.errors import ConfigError, listing

_IGNORED = -100
"""The label of a token that isn't learned, as torch's cross entropy has it."""


def wrapped(model_type: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """This model type's own methods that adapters take part in, wrapped; their signatures stay its own."""
    wrappers = {"forward": _forward, "generate": _generate, "resize_token_embeddings": _resize_token_embeddings}
    return {name: _wrapping(model_type, name, around) for name, around in wrappers.items() if hasattr(model_type, name)}


def _wrapping(model_type: Any, name: str, wrapper: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(getattr(model_type, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "adapter_state" not in vars(self):
            # Kept by whoever put a forward of its own before this one, and called after the adapters are gone.
            return getattr(model_type, name)(self, *args, **kwargs)
        return wrapper(model_type, self, *args, **kwargs)

    return method


def _forward(model_type: Any, model: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
    """The model's forward; in training, its loss is computed without the logits of the whole batch."""
    inside = model.adapter_state.call.inside
    if inside is not None:
        return inside(*args, **kwargs)
    if model.training and torch.is_grad_enabled():
        args = tuple(_tracked(model, value) for value in args)
        # Some models' masks are of numbers too, and none of them is to get a gradient.
        kwargs = {name: v if name.endswith("mask") else _tracked(model, v) for name, v in kwargs.items()}
    function = functools.partial(_around, model, frozen_forward(model))
    head = lazy_head(model) if kwargs.get("labels") is not None else None
    if head is not None and "use_cache" in _parameters(model_type):
        # A step that computes its loss reads no cache, which would hold every key and value until it ends.
        kwargs.setdefault("use_cache", False)
    if head is None:
        with _rows(model, adapter_names, args, kwargs):
            return function(*args, **kwargs)
    # The lazy head is on for this call alone: hooks and callers behind it see real tensors.
    with _rows(model, adapter_names, args, kwargs), model.adapter_state.using(lazy_head=head):
        return without_lazy(function(*args, **kwargs))


def _around(model: Any, frozen: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The model under what the adapters in effect do around the whole of it."""
    # Rows name their adapters, of which none does anything here: the active one has no part in such a batch.
    if not deltas_of(model) or model.adapter_state.call.rows is not None:
        return frozen(model, *args, **kwargs)
    return run(model, frozen, *args, **kwargs)


def _tracked(model: Any, value: Any) -> Any:
    """An input that needs a gradient where it is of numbers and the model checkpoints its layers.

    Reentrant checkpointing gives gradients only behind an input that needs one, which pixels and sounds don't.
    transformers sees to token embeddings itself.
    """
    is_numbers = isinstance(value, Tensor) and value.is_floating_point() and value.is_leaf and not value.requires_grad
    if not is_numbers or not recomputes(model):
        return value
    return value.detach().requires_grad_()


@functools.cache
def _parameters(model_type: Any) -> frozenset[str]:
    return frozenset(inspect.signature(model_type.forward).parameters)


def _generate(
    model_type: Any, model: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
) -> Any:
    with _rows(model, adapter_names, args, kwargs):
        return model_type.generate(model, *args, **kwargs)


def _check_count(adapter_names: Sequence[str], model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """See that each row of the batch has a name. Raises: ConfigError."""
    named = (getattr(model, "main_input_name", None), "input_ids", "inputs_embeds", "inputs")
    candidates = [*args, *(kwargs.get(str(name)) for name in named), *kwargs.values()]
    # The first argument with rows: callers pass ids, embeddings or pixels, by position or by name.
    batch = next((value for value in candidates if isinstance(value, Tensor) and value.ndim), None)
    if batch is not None and len(batch) != len(adapter_names):
        raise ConfigError(
            f"adapter_names has {len(adapter_names)} names for a batch of {len(batch)} rows; give one for each row"
        )


@contextmanager
def _rows(
    model: Any, adapter_names: Sequence[str] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Each row of the batch under its own adapter; while adapters are disabled, all under none."""
    if adapter_names is None:
        yield
        return
    model.adapter_state.check_known(*(set(adapter_names) - {BASE}))
    _check_count(adapter_names, model, args, kwargs)
    if not model.adapter_state.enabled or model.adapter_state.call.applied == ():
        adapter_names = [BASE] * len(adapter_names)
    if model.training or model.adapter_state.merged:
        raise ConfigError(
            "adapter_names is for inference with unmerged adapters; call model.eval() and unmerge_adapter() first"
        )
    for name in adapter_names:
        if name in deltas_of(model) and not deltas_of(model)[name].rests:
            raise ConfigError(
                f"the adapter '{name}' changes the whole model and can't be mixed with others in one "
                "batch; run its rows as a batch of their own"
            )
    with model.adapter_state.using(rows=RowAdapters(tuple(adapter_names))):
        yield


def _resize_token_embeddings(model_type: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own, with new rows frozen; refused where an adapter has a change of the old number of rows."""
    for path, module in token_embeddings(model).items():
        if deltas_of(module):
            raise ConfigError(
                f"{listing(deltas_of(module))} changes '{path}' and was made for the number of tokens that it has; "
                "resize the base before the adapter is attached"
            )
    embeddings = model_type.resize_token_embeddings(model, *args, **kwargs)
    for module in token_embeddings(model).values():
        module.requires_grad_(False)
    adopt_head(model, model.adapter_state)  # which may be a new module
    return embeddings


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


PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""What TRL's forward gives of each token."""
_COMPACT = ("cuda", "xpu")
"""Where TRL's kernels score the learned tokens alone by themselves."""


def on_learned_tokens(model: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """TRL's forward, whose head scores the tokens that are learned and no others on every device.

    On a processor TRL (1.16) multiplies the hidden states of the whole batch by the head, forward, once more in the
    backward pass and for the gradient, and fills in 0 for what isn't learned. What comes out is the same.
    """

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
        learned = targets != _IGNORED
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
