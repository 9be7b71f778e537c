"""How far two models' answers to the same inputs lie apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Drift:
    """The difference between two sets of logits, in plain numbers."""

    max_abs: float
    mean_abs: float
    relative: float
    kl: float
    top1_agreement: float

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.2e}, largest difference {self.max_abs:.3g}, mean {self.mean_abs:.3g}, "
            f"relative {self.relative:.2e}, same first choice {self.top1_agreement:.1%}"
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

    def __str__(self) -> str:
        parts = [self.left]
        if self.outputs:
            parts.append(str(self.outputs))
        if self.loss_before is not None:
            parts.append(f"loss {self.loss_before:.4f} before, {self.loss_after:.4f} after")
        return "; ".join(parts)

    @property
    def left(self) -> str:
        """What is left in the weights, in words."""
        return (
            f"{self.survived:.1%} of the update is left, under noise of {self.noise:.2f} times its size; "
            f"{self.beyond:,} of {self.entries:,} entries were beyond the old scales, which were computed anew"
        )


def compare_outputs(before: torch.Tensor, after: torch.Tensor) -> Drift:
    """Compare logits (..., classes) of the same inputs: `kl` is the mean of KL(before || after) in nats.

    Raises ValueError if the shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"logits of different shapes can't be compared: {before.shape} and {after.shape}")
    # In float64, because the difference of two nearly equal distributions is all rounding in float32.
    p, q = before.detach().double().cpu(), after.detach().double().cpu()
    gap = (p - q).abs()
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return Drift(
        max_abs=gap.max().item(),
        mean_abs=gap.mean().item(),
        relative=((p - q).norm() / p.norm().clamp_min(torch.finfo(torch.float64).tiny)).item(),
        kl=kl.clamp_min(0).item(),
        top1_agreement=(p.argmax(-1) == q.argmax(-1)).double().mean().item(),
    )
