"""A model that carries adapters becomes a plain one again, the same object: with them in its weights, or without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from slimtune.adapters.adapter import adopted_modules
from slimtune.adapters.adopt import release
from slimtune.adapters.merge import merge, unmerge
from slimtune.adapters.requantize import MergeDrift, grids_of, merge_requantized, pack_on_grids
from slimtune.quantization.dequantize import expanded, make_plain, plain_dtype, untie_if_changed
from slimtune.storage.quantization_metadata import mend_saving


def merge_plain(model: Any, names: tuple[str, ...], safe: bool) -> Any:
    """Merge these adapters beside those that are merged, and release the model; a quantized base is expanded.

    Raises:
        MergeError: it can't be done or strays too far; nothing is changed then.
        ConfigError: the base is quantized in a way that can't be expanded.
    """
    # One dtype for the modules that an adapter changes and for those that none does.
    dtype = plain_dtype(model)
    with _as_before_on_failure(model):
        if not set(names) <= set(model.adapter_state.merged):
            merge(model, names, safe, dtype)
        weights = expanded(model, dtype)
    untie_if_changed(model)
    return make_plain(released(model), weights)


def merge_quantized(
    model: Any, names: tuple[str, ...], safe: bool, inputs: Mapping[str, Tensor] | None
) -> MergeDrift | None:
    """Merge these adapters and those that are merged into weights that stay quantized, and release the model.

    What that loses is kept as the model's `merge_drift`; None of an adapter that was trained on a grid, whose codes are
    stored as they are. Raises: MergeError, and nothing is changed then.
    """
    merged = model.adapter_state.merged
    together = tuple(dict.fromkeys((*merged, *names)))
    grids = grids_of(model, together)
    if grids:
        if not set(together) <= set(merged):
            merge(model, together, safe)
        untie_if_changed(model)
        pack_on_grids(released(model), grids)
        return None
    with _as_before_on_failure(model):
        # What the outputs were is measured with all of them applied, which on merged weights would count some twice.
        unmerge(model)
        drift = merge_requantized(model, together, safe, inputs)
    untie_if_changed(model)
    released(model)
    mend_saving(model)
    model.merge_drift = drift
    return drift


@contextmanager
def _as_before_on_failure(model: Any) -> Iterator[None]:
    """The adapters that are merged now merged again, and no others, should the block raise."""
    merged = model.adapter_state.merged
    try:
        yield
    except BaseException:
        unmerge(model)
        if merged:
            merge(model, merged)
        raise


def released(model: Any) -> Any:
    """The model with its classes from before it was adopted, whatever its weights are now."""
    trained_before = model.adapter_state.trained_before
    for _, module in adopted_modules(model):
        release(module)
    # That of another merge, before these adapters came.
    vars(model).pop("merge_drift", None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained_before)
    return model
