"""Writing the adapters of a model into its weights, and making it the plain model again that it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from slimtune import merge as merging
from slimtune.adapter import adopted_modules
from slimtune.adopt import release
from slimtune.carrying import Carrying
from slimtune.errors import ConfigError, MergeError, listing
from slimtune.quantized.dequantize import expanded, make_plain, mend_saving, plain_dtype
from slimtune.quantized.requantize import merge_requantized

_ADVICE = (
    "; most of the update is rounded away: merge into 16 bits, or for a model in few bits merge into the original "
    "16-bit base and quantize what that gives"
)


class Unloading(Carrying):
    """What a `PeftModel` can do to become a plain model."""

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The untouched base for a while, also while adapters are merged."""
        merged = self.adapter_switch.merged
        self.unmerge_adapter()
        try:
            with self.adapter_switch.using(enabled=False):
                yield
        finally:
            if merged:
                self.merge_adapter(merged)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Write the active adapters (or these) into the weights; `unmerge_adapter` takes them out to the bit.

        Args:
            safe_merge: compare the outputs before and after on probe inputs.

        Raises:
            MergeError: it can't be done or strays too far; nothing is changed then.
        """
        self._merge(adapter_names, safe_merge)

    def _merge(self, adapter_names: Sequence[str] | None, safe: bool, dtype: torch.dtype | None = None) -> None:
        names = self.adapter_switch.active if adapter_names is None else tuple(adapter_names)
        self._check_known(*names)
        if self.kept:
            merged = listing(self.adapter_switch.merged)
            raise MergeError(f"adapters are merged already: {merged}; call unmerge_adapter() first")
        self.kept = merging.merge(self, names, safe, dtype)

    def unmerge_adapter(self) -> None:
        """Put the weights back that were there before `merge_adapter`."""
        merging.restore(self.kept)
        self.kept, self.adapter_switch.merged = [], ()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        requantize: bool = False,
        drift_inputs: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The plain model with the active adapters (or these) in its weights; it is this very object.

        A quantized base becomes a plain one of the model's dtype, also where no adapter is.

        Args:
            progressbar: taken as in `peft`; a merge takes no time to speak of and shows none.
            safe_merge: compare the outputs before and after on probe inputs.
            requantize: leave a quantized base quantized; the merged weights are quantized again, which wipes small
                updates out. What is lost is warned of and kept as the model's `merge_drift`.
            drift_inputs: a batch to measure that on, with labels for the loss; without it, pseudo-random inputs.

        Raises:
            MergeError: it can't be done or strays too far; nothing is changed then.
            ConfigError: the base is quantized in a way that can't be expanded.
        """
        if drift_inputs is not None and not requantize:
            raise ConfigError("drift_inputs measure what requantize=True loses; pass both or none")
        names = self.adapter_switch.merged or adapter_names
        if requantize:
            return self._merged_requantized(names, safe_merge, drift_inputs)
        dtype = plain_dtype(self)
        was_merged = bool(self.kept)
        if not was_merged:
            self._merge(names, safe_merge, dtype)
        try:
            weights = expanded(self, dtype)
        except BaseException:
            if not was_merged:
                self.unmerge_adapter()
            raise
        merging.untie_if_changed(self)
        return make_plain(self._released(), weights)

    def _merged_requantized(self, names: Sequence[str] | None, safe: bool, inputs: Mapping[str, Tensor] | None) -> Any:
        merged = self.adapter_switch.merged
        chosen = self.adapter_switch.active if names is None else tuple(names)
        self._check_known(*chosen)
        self.unmerge_adapter()
        try:
            self.kept, drift = merge_requantized(self, chosen, safe, inputs)
        except BaseException:
            if merged:
                self.merge_adapter(merged)
            raise
        merging.untie_if_changed(self)
        model = self._released()
        mend_saving(model)
        model.merge_drift = drift
        warnings.warn(f"merged into quantized weights: {drift}{_ADVICE if drift.survived < 0.5 else ''}", stacklevel=3)
        return model

    def unload(self) -> Any:
        """The plain model without any adapter; it is this very object, with its own class and tensors."""
        self.unmerge_adapter()
        return self._released()

    def _released(self) -> Any:
        model: Any = self
        trained_before = self.trained_before
        for _, module in adopted_modules(model):
            release(module)
        for name in ("peft_config", "return_logits", "kept", "trained_before"):
            delattr(model, name)
        # That of another merge, before these adapters came.
        vars(model).pop("merge_drift", None)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained_before)
        return model
