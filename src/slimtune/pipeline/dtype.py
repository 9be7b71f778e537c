"""The dtype of a training: the one that its recipe names, or the one that its device is fast in."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from slimtune.models.device import pick_device, reason_for_float32
from slimtune.models.load import computing_dtype_of, dtype_named_by
from slimtune.plan.plan import read_config
from slimtune.recipe.method import FULL

if TYPE_CHECKING:
    from slimtune.recipe.recipe import MethodSettings, ModelSettings


def in_computing_dtype(model: ModelSettings, method: MethodSettings) -> tuple[ModelSettings, str | None]:
    """The model with `auto` as float32 where the processor only emulates the 16 bits of what is stored, and why.

    Full tuning is left alone: its weights are in float32 anyway, and computes as `memory_check.autocasts` says.

    Raises:
        ModelNotFoundError: no such model.
        ConfigError: no such device.
    """
    device = pick_device(model.device)
    # Elsewhere `auto` is what is stored, and no configuration has to be read for it.
    if model.dtype != "auto" or method.name == FULL or not device.startswith("cpu"):
        return model, None
    config = read_config(model.source, model.trust_remote_code)
    dtype, stored = computing_dtype_of(config, device), dtype_named_by(config)
    return replace(model, dtype=dtype), reason_for_float32(stored) if stored and dtype != "auto" else None


def in_stored_dtype(model: ModelSettings, method: MethodSettings) -> ModelSettings:
    """The model with `auto` as the dtype that its configuration names, whatever the processor is fast in."""
    if model.dtype != "auto" or method.name == FULL:
        return model
    return replace(model, dtype=dtype_named_by(read_config(model.source, model.trust_remote_code)) or "auto")
