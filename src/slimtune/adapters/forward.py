"""How a model that carries adapters is called: its loss in chunks, and rows of a batch under adapters of their own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.adapters.adopt import adopt_head, frozen_forward, run
from slimtune.adapters.embeddings import token_embeddings
from slimtune.adapters.lazy_logits import lazy_head, without_lazy
from slimtune.adapters.rows import BASE, RowAdapters
from slimtune.core.frozen import deltas_of
from slimtune.core.roles import recomputes
from slimtune.errors import ConfigError, listing


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
