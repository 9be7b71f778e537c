"""Folding adapters into the weights, and taking them out again to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.adapter import adopted_modules
from slimtune.bases import base_of
from slimtune.delta import Dense, deltas_of, standing_in
from slimtune.drift import Drift, compare_outputs
from slimtune.errors import MergeError
from slimtune.probe import check_fold

MAX_RELATIVE_DRIFT = 0.1
"""A safe merge refuses when the outputs change by more than this part of their norm; bf16 rounding stays far below."""

Kept = list[tuple[nn.Module, dict[str, Tensor]]]
"""What was in the modules before a merge: (module, its tensors by name)."""

Store = Callable[[Any, Dense], Dense]
"""Turns a module and its folded tensors into those that the module is to hold."""


def fold(module: Any, names: tuple[str, ...], dtype: torch.dtype | None = None) -> Dense:
    """The parameters of a module that these adapters change, with them written in; nothing is changed.

    They are as the module stores them, but for a weight that is stored as codes, which is in floating point.

    Args:
        dtype: of a weight that is stored as codes; without it, what the module computes in.

    Raises:
        MergeError: a change has no form as weights, or the result is not finite.
    """
    base = base_of(module)
    deltas = [deltas_of(module)[name] for name in names if name in deltas_of(module)]
    held = {name: tensor.detach().clone() for delta in deltas for name, tensor in delta.stand_ins().items()}
    expands_to = None if base.recall(module) is None else dtype or base.outline(module).dtype
    with standing_in(module, held):
        frozen = base.dense(module)
    if expands_to is not None:
        # Rounded once, at the end.
        frozen["weight"] = frozen["weight"].to(torch.promote_types(frozen["weight"].dtype, expands_to))
    dense = frozen
    for delta in deltas:
        dense = delta.fold_beside(dense, frozen)
    changed = {name for name, tensor in dense.items() if tensor is not frozen[name]}
    stored = held | {name: tensor for name, tensor in base.repack(module, dense).items() if name in changed}
    if expands_to is not None and "weight" in stored:
        stored["weight"] = stored["weight"].to(expands_to)
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise MergeError(
                f"merging makes '{name}' of a {type(module).__name__} infinite or not a number; the adapter is damaged "
                "or its training diverged"
            )
    check_fold(module, names, stored)
    return stored


def merge(
    model: Any, names: tuple[str, ...], safe: bool = False, dtype: torch.dtype | None = None, store: Store | None = None
) -> Kept:
    """Write adapters into the model's weights; gives back the tensors that were there.

    Args:
        safe: compare the outputs before and after on probe inputs.
        dtype: of weights that are stored as codes; without it, what their modules compute in.
        store: what is put into a module in place of the folded tensors.

    Raises:
        MergeError: it can't be done or strays too far; nothing is changed then.
    """
    switch = model.adapter_switch
    probe = probe_inputs(model) if safe else None
    with switch.using(active=names):
        before = outputs(model, probe) if probe else None
    kept: Kept = []
    try:
        for path, module in adopted_modules(model):
            if any(name in deltas_of(module) for name in names):
                kept.append((module, _exchange(module, _at(path, module, names, dtype, store))))
        _tie_again(kept)
        switch.merged = names
        if probe and before is not None:
            with switch.using(active=names):
                _check_drift(compare_outputs(before, outputs(model, probe)))
    except BaseException:
        restore(kept)
        switch.merged = ()
        raise
    return kept


def _check_drift(drift: Drift) -> None:
    if not drift.relative <= MAX_RELATIVE_DRIFT:
        raise MergeError(
            f"the merged model's outputs differ from the unmerged by {drift.relative:.1%} of their norm, beyond "
            f"{MAX_RELATIVE_DRIFT:.0%}; the model is as before"
        )


def _at(path: str, module: Any, names: tuple[str, ...], dtype: torch.dtype | None, store: Store | None) -> Dense:
    """What a module is to hold; errors name its path."""
    try:
        folded = fold(module, names, dtype)
        return store(module, folded) if store else folded
    except MergeError as error:
        raise MergeError(f"'{path}': {error}" if path else str(error)) from error


def restore(kept: Kept) -> None:
    """Put back the very tensors that were there before a merge."""
    for module, tensors in reversed(kept):
        _exchange(module, tensors)


def _exchange(module: nn.Module, tensors: Dense) -> Dense:
    """Put tensors into the module; gives back those that they replace."""
    before: Dense = {}
    for name, tensor in tensors.items():
        slots: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
        own = slots[name]
        if tensor is own or (slots is module._parameters and _begin_alike(tensor, own)):
            continue
        before[name] = own
        if slots is module._parameters and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=own.requires_grad)
        slots[name] = tensor
    return before


def _begin_alike(tensor: Tensor, own: Tensor) -> bool:
    """Whether two tensors begin at the same place of one storage."""
    same = tensor.untyped_storage()._cdata == own.untyped_storage()._cdata
    return same and tensor.storage_offset() == own.storage_offset()


def _tie_again(kept: Kept) -> None:
    """Make weights that were one tensor before one again where they came out equal."""
    merged: dict[int, Tensor] = {}
    for module, before in kept:
        for name, own in before.items():
            slots: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
            first = merged.setdefault(id(own), slots[name])
            if first is not slots[name] and torch.equal(first, slots[name]):
                slots[name] = first


def untie_if_changed(model: Any) -> None:
    """Take the ties that a merge undid out of the model's own account of them, so that a save stores both ends.

    Where none is left, the config says so. Where some are, as between T5's embeddings, a reload finds both ends of the
    others in the file and leaves them apart.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    look_up = getattr(model, "get_parameter_or_buffer", None)
    still = {end: source for end, source in tied.items() if look_up and look_up(end) is look_up(source)}
    if len(still) == len(tied):
        return
    model.all_tied_weights_keys = still
    model.__dict__["_tied_weights_keys"] = still or None
    if not still:
        model.config.tie_word_embeddings = False


def probe_inputs(model: Any, rows: int = 2, tokens: int = 32) -> dict[str, Tensor] | None:
    """Fixed pseudo-random inputs for a transformers model, or None where it isn't known what it takes."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocabulary = getattr(config, "vocab_size", None)
    if main == "input_ids" and vocabulary:
        ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator).to(device)
        extra = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
        return {"input_ids": ids} | extra
    size = getattr(config, "image_size", None)
    if main == "pixel_values" and isinstance(size, int):
        channels = getattr(config, "num_channels", 3)
        pixels = torch.randn(rows, channels, size, size, generator=generator)
        return {"pixel_values": pixels.to(device, next(model.parameters()).dtype)}
    return None


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The model's first output (its logits, or its last hidden state), in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        return model(**inputs)[0].float()
    finally:
        model.train(was_training)
