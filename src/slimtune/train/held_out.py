"""The loss on held-out examples: the mean over all that is learned of them, whatever batches they come in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import find_batch_size

from slimtune.data.encode import IGNORED


class HeldOutMean:
    """Mixed in front of a Trainer (TRL's too): `eval_loss` is sum_b(n_b * L_b) / sum_b(n_b) over all batches b.

    L_b is the mean over the n_b items of a batch: tokens that are learned, or texts with a label. Trainer's own is the
    mean over batches, in which an item counts for less the more of them share its batch.
    """

    accelerator: Any
    args: Any
    model_accepts_loss_kwargs: bool

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; the loss is noted with the number of its items."""
        inputs = self._without_repeated(inputs)
        items = self.items_of(inputs)
        found = super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if found[0] is not None:
            self._noted.append((found[0].detach(), items))
        return found

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval",
    ) -> Any:  # fmt: skip
        """Trainer's own, with the mean over all items in place of that over batches."""
        self._noted: list[tuple[Tensor, Tensor]] = []
        output = super().evaluation_loop(  # type: ignore[misc]
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        if self._noted:
            output.metrics[f"{metric_key_prefix}_loss"] = self._mean()
        return output

    def items_of(self, inputs: Any) -> Tensor:
        """By what a batch's loss is multiplied, for the products of all batches and processes to add up."""
        # Of several processes each has its own sum, divided by the items of all and multiplied by their number.
        counted: Any = self._get_num_items_in_batch([inputs], self.args.device)  # type: ignore[attr-defined]
        if counted is not None:
            return counted / (self.args.world_size if self.args.average_tokens_across_devices else 1)
        labels = inputs["labels"]
        shifted = labels[..., 1:] if self._loss_shifts_labels else labels  # type: ignore[attr-defined]
        return (shifted != IGNORED).sum()

    def _mean(self) -> float:
        losses, items = (torch.stack(found).cpu().double() for found in zip(*self._noted, strict=True))
        # The mean over nothing is no number.
        sums = torch.stack([torch.where(items > 0, losses * items, 0.0).sum(), items.sum()])
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum")
        return float(sums[0] / sums[1])

    def _without_repeated(self, inputs: Any) -> Any:
        """Several processes fill their last batches up with examples that were seen; these are not to count again."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0 or "labels" not in inputs:
            return inputs
        first = self.args.process_index * (find_batch_size(inputs) or 0)
        labels = inputs["labels"].clone()
        labels[max(0, state.remainder - first) :] = IGNORED
        return {**inputs, "labels": labels}
