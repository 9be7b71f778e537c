"""Cross-entropy over a frozen output layer that never holds the logits of the whole batch.

    loss = sum_t -log softmax(h_t W^T + b)[label_t], divided by the number of labels for reduction="mean"

Each chunk's logits give its part of the loss and, at once, its part of the hidden state's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

HELD = {"cpu": 2**23, "cuda": 2**27}
"""How many logits are held at a time, by device: few products with the whole weight are fast ones."""

FLOAT_SHARE = 8
"""The softmax of a chunk runs over this many parts of it, so that little is held in float32."""


def chunked_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_T: Tensor,
    ignore_index: int = -100, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The loss of `F.cross_entropy(hidden @ weight.T + bias, labels)`, for a weight that takes no gradient.

    Args:
        hidden_TD: last hidden states, (tokens, features).
        weight_VD: the output layer's weight, (vocabulary, features).
        bias_V: its bias, or None.
        labels_T: (tokens,) class numbers; `ignore_index` marks those that don't count.
        reduction: "mean" or "sum".
    """
    # Prompts and pads have no label, and no logits are computed for them.
    supervised = labels_T != ignore_index
    count = supervised.sum()
    index = supervised.nonzero().squeeze(-1)
    if index.numel() < labels_T.numel():
        hidden_TD, labels_T = hidden_TD[index], labels_T[index]
    total: Any = _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, bias_V, labels_T)
    # Without any label 0 / 0, as `F.cross_entropy` has it.
    return total / count if reduction == "mean" else total


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_T: Tensor) -> Tensor:
        # (tokens, features), complete after the forward: the logits that it comes from are there only now. What
        # backward receives for a sum is one number, which the whole gradient is multiplied by.
        gradient_TD = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        # A chunk of C rows, (C, vocabulary) in the weight's dtype.
        chunk = max(FLOAT_SHARE, HELD.get(hidden_TD.device.type, HELD["cuda"]) // weight_VD.shape[0])
        for start in range(0, hidden_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits_CV = F.linear(hidden_TD[rows].to(weight_VD.dtype), weight_VD, bias_V)
            # The softmax is in float32, twice the size of 16-bit logits: over an eighth of the chunk at a time.
            parts = zip(logits_CV.split(chunk // FLOAT_SHARE), labels_T[rows].split(chunk // FLOAT_SHARE), strict=True)
            for part_PV, labels_P in parts:
                total += _loss_and_gradient(part_PV, labels_P.unsqueeze(-1))
            if gradient_TD is not None:
                # The logits have become softmax - one-hot by now.
                gradient_TD[rows] = logits_CV @ weight_VD
        ctx.save_for_backward(gradient_TD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = gradients
        (gradient_TD,) = ctx.saved_tensors
        return gradient_TD * gradient.to(gradient_TD.dtype), None, None, None


def _loss_and_gradient(logits_PV: Tensor, labels_P1: Tensor) -> Tensor:
    """The summed loss of some rows; the logits become its gradient, softmax minus one-hot."""
    p_PV = F.softmax(logits_PV, dim=-1, dtype=torch.float32)
    # log sum exp = max - log p_max, and p_max is never small enough to lose digits.
    log_sum_P1 = logits_PV.amax(-1, keepdim=True).float() - p_PV.amax(-1, keepdim=True).log()
    loss = (log_sum_P1 - logits_PV.gather(-1, labels_P1).float()).sum()
    # In float32: p - 1 of a label that is all but certain has no digits left in 16 bits.
    p_PV.scatter_add_(-1, labels_P1, p_PV.new_full((), -1.0).expand_as(labels_P1))
    logits_PV.copy_(p_PV)
    return loss
