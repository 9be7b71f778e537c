"""Merging into a base that stays quantized: the folded weights quantized again, and what that loses measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimtune.adapters.adapter import attached
from slimtune.adapters.merge import (
    Drift,
    as_before_on_failure,
    compare_outputs,
    merge,
    probe_inputs,
    released,
    unmerge,
)
from slimtune.bases import base_of
from slimtune.bases.int4 import LinearInt4
from slimtune.bases.int8 import LinearInt8
from slimtune.bases.packed import PackedLinear, as_linear
from slimtune.core.constrained import Constrained, Grid
from slimtune.core.frozen import Dense, with_tensors
from slimtune.errors import MergeError
from slimtune.quantization.dequantize import untie_if_changed
from slimtune.storage.quantization_metadata import mend_saving

_ADVICE = (
    "; most of the update is rounded away: merge into 16 bits, or for a model in few bits merge into the original "
    "16-bit base and quantize what that gives"
)


@dataclass(frozen=True)
class MergeDrift:
    """What a merge into quantized weights lost: the model with its adapter apart against the merged one.

    With dW the change that the adapter makes to the weights, and D the one that was left once they were quantized
    again, over all of them together:

    Attributes:
        outputs: how far the logits moved; None where no inputs are known for the model.
        loss_before: with the adapter apart, where the inputs had labels.
        loss_after: merged.
        survived: <D, dW> / ||dW||^2, which is 1 where nothing is lost and 0 where nothing is left.
        noise: ||D - dW|| / ||dW||.
        beyond: how many entries the scales before the merge couldn't have reached; scales are new, so none is clipped.
        entries: of how many.
    """

    outputs: Drift | None
    loss_before: float | None
    loss_after: float | None
    survived: float
    noise: float
    beyond: int
    entries: int

    @property
    def advice(self) -> str:
        """What to do instead, where most of the update is lost."""
        return _ADVICE if self.survived < 0.5 else ""

    def __str__(self) -> str:
        parts = [self.left]
        if self.outputs:
            parts.append(str(self.outputs))
        if self.loss_before is not None:
            parts.append(f"loss {self.loss_before:.4f} before, {self.loss_after:.4f} after")
        return "; ".join(parts)

    @property
    def left(self) -> str:
        """A sentence on what is left in the weights."""
        return (
            f"{self.survived:.1%} of the update is left, under noise of {self.noise:.2f} times its size; "
            f"{self.beyond:,} of {self.entries:,} entries were beyond the old scales, which were computed anew"
        )


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
    with as_before_on_failure(model):
        # What the outputs were is measured with all of them applied, which on merged weights would count some twice.
        unmerge(model)
        drift = merge_requantized(model, together, safe, inputs)
    untie_if_changed(model)
    released(model)
    mend_saving(model)
    model.merge_drift = drift
    return drift


def merge_requantized(
    model: Any, names: tuple[str, ...], safe: bool = False, inputs: Mapping[str, Tensor] | None = None
) -> MergeDrift:
    """Write adapters into the model's weights, quantized again with each module's own settings and new scales.

    Gives back what was lost. Modules without a change of their weight keep their codes.

    Args:
        safe: refuse where the outputs stray too far, as `merge`.
        inputs: what the model is called with to compare its outputs, and its losses where there are labels.

    Raises:
        MergeError: nothing of it is quantized, it can't be done or strays too far; nothing is changed then.
    """
    probe = inputs if inputs is not None else probe_inputs(model)
    with model.adapter_state.using(applied=names):
        before = _answers(model, probe)
    store = _Requantizer()
    merge(model, names, safe, store=store)
    try:
        with model.adapter_state.using(applied=()):
            after = _answers(model, probe)
        if not store.modules:
            raise MergeError(
                f"{' and '.join(names)} changes no quantized weight of this model, so that there is nothing to "
                "quantize again; merge without requantize"
            )
    except BaseException:
        unmerge(model)
        raise
    for module, base in store.modules:
        # After the checks: until here a failure gives back the old tensors, and with them the old state.
        base.sync_state(module)
    outputs = compare_outputs(before[0], after[0]) if before and after else None
    losses = (before[1], after[1]) if before and after else (None, None)
    return MergeDrift(outputs, *losses, **store.figures())


def grids_of(model: Any, names: tuple[str, ...]) -> dict[str, Grid]:
    """The grid on which each weight lies under these adapters, by the path of its module."""
    placed = [pair for name in names for pair in attached(model, name)]
    return {
        site.name: delta.constraints["grid"]  # pyright: ignore[reportReturnType]
        for site, delta in placed
        if isinstance(delta, Constrained) and "grid" in delta.constraints
    }


def pack_on_grids(model: Any, grids: Mapping[str, Grid]) -> None:
    """Store weights that lie on grids as their codes and scales, which are the very same numbers."""
    for path, grid in grids.items():
        module: Any = as_linear(model.get_submodule(path))
        kind = LinearInt4 if grid.bits == 4 else LinearInt8
        kind.take(module, *grid.codes(module.weight.detach()))
    # transformers' quantizers import torchao, which takes seconds.
    from slimtune.quantization.integer import config_of, note_quantization

    note_quantization(model, config_of(model))


class _Requantizer:
    """Quantizes what a merge folded, and adds up what of the changes is left."""

    def __init__(self) -> None:
        self.modules: list[tuple[Any, PackedLinear]] = []
        self._update = self._left = self._strayed = 0.0
        self._beyond = self._entries = 0

    @torch.no_grad()
    def __call__(self, module: Any, folded: Dense) -> Dense:
        base = base_of(module)
        if not isinstance(base, PackedLinear) or "weight" not in folded or not base.is_packed(module):
            return folded
        # (out, in) in 16 or 32 bits: the sum, before it is put back onto a grid of 4 or 8 bits.
        merged_OI = folded["weight"]
        packed = base.quantize(module, merged_OI)
        # Expanded from the codes that are there: quantization's first loss is not counted as this merge's.
        before_OI = base.weight(module).float()
        after_OI = base.weight(with_tensors(module, packed)).float()
        if not torch.isfinite(after_OI).all():
            raise MergeError("the merged weight can't be quantized again: what comes back is not finite")
        # dW, what the adapter changes, and D, what is left of it between two grids of codes; their products are summed
        # in float64, because a D of pure rounding noise all but cancels in <D, dW>.
        update_OI, change_OI = merged_OI.float() - before_OI, after_OI - before_OI
        self._update += float(update_OI.double().square().sum())
        self._left += float((change_OI * update_OI).double().sum())
        self._strayed += float((change_OI - update_OI).double().square().sum())
        self._beyond += base.beyond(module, merged_OI)
        self._entries += merged_OI.numel()
        self.modules.append((module, base))
        return folded | packed

    def figures(self) -> dict[str, Any]:
        """Those of `MergeDrift` that follow from the weights; an update of nothing is left whole."""
        update = self._update
        return {
            "survived": self._left / update if update else 1.0,
            "noise": (self._strayed / update) ** 0.5 if update else 0.0,
            "beyond": self._beyond,
            "entries": self._entries,
        }


@torch.no_grad()
def _answers(model: Any, inputs: Mapping[str, Tensor] | None) -> tuple[Tensor, float | None] | None:
    """The model's logits where nothing is padded, and its loss where it gives one, in evaluation mode."""
    if inputs is None:
        return None
    was_training = model.training
    model.eval()
    try:
        output = model(**inputs)
    finally:
        model.train(was_training)
    logits = output if isinstance(output, Tensor) else output["logits"] if "logits" in output else output[0]
    loss, mask = getattr(output, "loss", None), inputs.get("attention_mask")
    if mask is not None and mask.shape == logits.shape[:-1]:
        # Outputs at pads are noise that no one reads, and would dilute or swamp the drift.
        logits = logits[mask.bool()]
    return logits.float(), None if loss is None else float(loss)
