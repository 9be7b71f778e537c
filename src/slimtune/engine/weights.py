"""The weights of a model while an engine runs it on a processor: in the order in which they are multiplied quickest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.adapters.adopt import reclass
from slimtune.core.frozen import walk
from slimtune.engine.model import frozen_alone, is_alike
from slimtune.models.device import ram
from slimtune.ops.reordered_linear import can_reorder, reordered

_WORTH_IT = 64
"""From so many steps on weights are reordered for them and brought back, which takes as long as some twenty steps."""
_SPARE = 10
"""How many times a second copy of a weight must fit into the free memory before one is made."""
_PROBE = 3
"""Tokens by which it is found which layers read the same tensor."""


@contextmanager
def reordered_weights(model: Any, steps: int | None = None) -> Iterator[None]:
    """The linear layers with their weights in oneDNN's blocks; those that read the same tensor multiply it at once.

    Which layers do is found by trial, and so is whether the model still answers as before: one that looks at more of a
    layer's output than its numbers has each layer by itself, and a layer whose weight the model's own code reads stays
    as it is. An output layer that shares its weight with the embedding gets a second one, where the memory is ample.

    Args:
        steps: how many follow; few aren't worth the way there and back. None for a model that is kept so.
    """
    modules: list[Any] = []
    # An encoder beside the decoder reads other tensors, of which a trial would have to know.
    if (steps is None or steps >= _WORTH_IT) and not model.config.is_encoder_decoder:
        modules = [module for module in dict.fromkeys(module for _, module in walk(model)) if can_reorder(module)]
    if not modules:
        yield
        return
    uses = Counter(_memory(tensor) for module in model.modules() for tensor in _tensors_of(module))
    own = [module for module in modules if uses[_memory(module._parameters["weight"])] == 1]
    with ExitStack() as restored:
        for module in modules:
            if uses[_memory(module._parameters["weight"])] > 1 and _has_room(module):
                restored.enter_context(reordered([module], reclass, is_kept=True))
        _reorder_together(model, own, restored)
        yield


def _reorder_together(model: Any, modules: Sequence[Any], restored: ExitStack) -> None:
    """Reorder the weights that no other module has, as many of them together as the model allows."""
    try:
        groups, expected_TV = _reading_the_same(model, modules)
    except Exception:
        # One that wants more than tokens can't be tried, and stays as it is.
        return
    together = restored.enter_context(ExitStack())
    _reorder(groups, together)
    answers_so = _answers_so(model, expected_TV)
    read = {module for module in modules if module.reads}
    if read or not answers_so:
        together.close()
        groups = groups if answers_so else [[module] for module in modules]
        _reorder([[module for module in group if module not in read] for group in groups], together)


def _reorder(groups: Sequence[Sequence[nn.Module]], restored: ExitStack) -> None:
    for group in filter(None, groups):
        restored.enter_context(reordered(group, reclass))


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    own = (*module._parameters.values(), *module._buffers.values())
    return (tensor for tensor in own if tensor is not None and tensor.layout == torch.strided)


def _memory(tensor: Any) -> int:
    """What tells a tensor's memory from any other: two parameters may be views of one."""
    return tensor.untyped_storage()._cdata


def _has_room(module: nn.Module) -> bool:
    machine, weight = ram(), module._parameters["weight"]
    return machine is not None and weight is not None and machine.available > _SPARE * weight.nbytes


def _reading_the_same(model: Any, modules: Sequence[nn.Module]) -> tuple[list[list[nn.Module]], Tensor]:
    """The modules by the tensor that they read in a forward, in the order of their calls, and that forward's logits."""
    calls: list[tuple[nn.Module, Tensor | None, Tensor | None]] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if args and isinstance(args[0], Tensor) else None
        # The tensor itself, so that no other one gets its address; and its numbers, which may be written over.
        calls.append((module, x, None if x is None else x.clone()))

    hooks = [module.register_forward_pre_hook(note) for module in modules]
    try:
        logits_TV = _logits(model)
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(module for module, _, _ in calls)
    groups: dict[Any, list[nn.Module]] = {}
    first: dict[int, Tensor] = {}
    for module, x, numbers in calls:
        if times[module] == 1 and x is not None and numbers is not None:
            is_same = torch.equal(first.setdefault(id(x), numbers), numbers)
            groups.setdefault(id(x) if is_same else module, []).append(module)
    alone = [[module] for module in modules if not any(module in group for group in groups.values())]
    return [*groups.values(), *alone], logits_TV


def _answers_so(model: Any, expected_TV: Tensor) -> bool:
    try:
        return is_alike(model, _logits(model), expected_TV)
    except Exception:
        # Whatever it is that a slice of a tensor isn't good enough for.
        return False


@torch.inference_mode()
def _logits(model: Any) -> Tensor:
    """What the model itself gives for a few tokens, (tokens, vocabulary)."""
    table = model.get_input_embeddings().weight
    ids_1T = torch.arange(_PROBE, device=table.device)[None] % table.shape[0]
    # A model in training may draw dropout, and what is drawn afterwards must be the same.
    with frozen_alone(model), torch.random.fork_rng(devices=[]):
        return model(input_ids=ids_1T, use_cache=False).logits[0].float()
