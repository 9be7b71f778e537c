"""Cross-entropy and log-probabilities behind a frozen output layer, which never hold the logits of the whole batch.

    log p_t = z_t[label_t] - log sum_v exp z_t[v],    z_t = scale (h_t W^T + b)
    loss = sum_t -log p_t, divided by the number of labels for reduction="mean"

Each chunk's logits give its log-probabilities and, at once, what the hidden state's gradient is but for one factor a
token, so that nothing is computed a second time in the backward pass:

    d log p_t / d h_t = scale (W[label_t] - softmax(z_t) W)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""The label of a token that isn't learned, as torch's cross entropy has it."""

HELD = {"cpu": 2**23, "cuda": 2**27}
"""How many logits are held at a time, by device: few products with the whole weight are fast ones."""

FLOAT_SHARE = 8
"""The softmax of a chunk runs over this many parts of it, so that little is held in float32."""


class TokenStatistics(NamedTuple):
    """What the logits of each token give, (tokens,) in float32; all but the first are None unless asked for.

    Attributes:
        log_probs: log p of the label.
        entropy: -sum_v p_v log p_v.
        log_sum_sq_probs: log sum_v p_v^2.
        mean_logits: the mean of z.
        is_top1: whether the label is the likeliest token, the first of those that are equally likely.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


def chunked_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_T: Tensor,
    ignore_index: int = IGNORED, reduction: str = "mean",
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
    total = -chunked_log_probs(hidden_TD.to(weight_VD.dtype), weight_VD, bias_V, labels_T).log_probs.sum()
    # Without any label 0 / 0, as `F.cross_entropy` has it.
    return total / count if reduction == "mean" else total


def chunked_log_probs(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_T: Tensor,
    scale: float = 1.0, also: Collection[str] = (),
) -> TokenStatistics:  # fmt: skip
    """The log-probability of each token's label, for a weight that takes no gradient.

    Args:
        hidden_TD: last hidden states, (tokens, features), in the weight's dtype.
        weight_VD: the output layer's weight, (vocabulary, features).
        bias_V: its bias, or None.
        labels_T: (tokens,) class numbers.
        scale: of the logits, one over the temperature.
        also: the names of other statistics that are wanted; of these the entropy alone has a gradient.
    """
    if not torch.is_grad_enabled():
        # The node sees what may take a gradient, and not whether any is taken.
        hidden_TD = hidden_TD.detach()
    statistics: Any = _ChunkedLogProbs.apply(hidden_TD, weight_VD, bias_V, labels_T, scale, frozenset(also))
    return TokenStatistics(*statistics)


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_T: Tensor, scale: float,
        also: frozenset[str],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        ctx.set_materialize_grads(False)
        # (tokens, features), complete after the forward: the logits that it comes from are there only now. What
        # backward receives is one number a token, which its row is multiplied by.
        gradient_TD = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        parts: list[TokenStatistics] = []
        size, learns = rows_in_float(weight_VD.device, weight_VD.shape[0]), gradient_TD is not None
        for rows, logits_CV in _chunks(hidden_TD, weight_VD, bias_V):
            each = zip(logits_CV.split(size), labels_T[rows].split(size), strict=True)
            parts.extend(_statistics(part_PV, labels_P, scale, also, learns) for part_PV, labels_P in each)
            if gradient_TD is not None:
                # The logits have become softmax - one-hot by now.
                gradient_TD[rows] = logits_CV @ weight_VD
        whole = [None if each[0] is None else torch.cat(each) for each in zip(*parts, strict=True)]
        ctx.mark_non_differentiable(*(each for each in whole[2:] if each is not None))
        entropy_T = whole[1]
        # The entropy's own gradient is wanted rarely, and takes the logits a second time.
        again = (None,) * 4 if entropy_T is None else (hidden_TD, weight_VD, bias_V, entropy_T)
        ctx.save_for_backward(gradient_TD, *again)
        ctx.scale = scale
        return tuple(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        of_log_probs_T, of_entropy_T, *_ = gradients
        gradient_TD, hidden_TD, weight_VD, bias_V, entropy_T = ctx.saved_tensors
        total_TD = None
        if of_log_probs_T is not None:
            total_TD = gradient_TD * (of_log_probs_T * -ctx.scale).to(gradient_TD.dtype).unsqueeze(-1)
        if of_entropy_T is not None:
            factor_T = of_entropy_T * ctx.scale
            own_TD = _entropy_gradient(hidden_TD, weight_VD, bias_V, entropy_T, factor_T, ctx.scale)
            total_TD = own_TD if total_TD is None else total_TD + own_TD
        return total_TD, None, None, None, None, None


def _chunks(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Rows with their logits, (C, vocabulary) in the weight's dtype, which may be written over."""
    chunk = FLOAT_SHARE * rows_in_float(weight_VD.device, weight_VD.shape[0])
    # Of no rows one chunk that is empty, so that their statistics are.
    for start in range(0, max(1, hidden_TD.shape[0]), chunk):
        rows = slice(start, start + chunk)
        yield rows, F.linear(hidden_TD[rows], weight_VD, bias_V)


def rows_in_float(device: torch.device, vocabulary: int) -> int:
    """How many rows of logits a softmax runs over at a time: in float32 they take twice what 16 bits do."""
    return max(1, HELD.get(device.type, HELD["cuda"]) // vocabulary // FLOAT_SHARE)


def _statistics(
    logits_PV: Tensor, labels_P: Tensor, scale: float, also: frozenset[str], learns: bool
) -> TokenStatistics:
    """Those of some rows; where the tokens learn, the logits become softmax minus one-hot."""
    labels_P1 = labels_P.unsqueeze(-1)
    # In 16 bits the softmax reads the logits as they are, and writes in float32.
    z_PV = logits_PV if scale == 1.0 and "entropy" not in also else logits_PV.float()
    if scale != 1.0:
        z_PV.mul_(scale)
    p_PV = F.softmax(z_PV, dim=-1, dtype=torch.float32)
    # log sum exp = max - log p_max, and p_max is never small enough to lose digits.
    log_sum_P1 = z_PV.amax(-1, keepdim=True).float() - p_PV.amax(-1, keepdim=True).log()
    log_sum_P = log_sum_P1.squeeze(-1)
    statistics: dict[str, Tensor] = {"log_probs": z_PV.gather(-1, labels_P1).float().squeeze(-1) - log_sum_P}
    if "entropy" in also:
        # -sum p (z - log sum) = log sum - p z, as one dot product a row.
        statistics["entropy"] = log_sum_P - torch.bmm(p_PV.unsqueeze(1), z_PV.unsqueeze(2)).view(-1)
    if "log_sum_sq_probs" in also:
        statistics["log_sum_sq_probs"] = p_PV.square().sum(-1).log()
    if "mean_logits" in also:
        statistics["mean_logits"] = z_PV.mean(-1, dtype=torch.float32)
    if "is_top1" in also:
        statistics["is_top1"] = z_PV.argmax(-1) == labels_P
    if learns:
        # In float32: p - 1 of a label that is all but certain has no digits left in 16 bits.
        p_PV.scatter_add_(-1, labels_P1, p_PV.new_full((), -1.0).expand_as(labels_P1))
        logits_PV.copy_(p_PV)
    return TokenStatistics(**statistics)


def _entropy_gradient(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, entropy_T: Tensor, factor_T: Tensor, scale: float
) -> Tensor:
    """d H / d z_v = -p_v (log p_v + H), each row times its factor, times W; (tokens, features)."""
    gradient_TD, size = torch.empty_like(hidden_TD), rows_in_float(weight_VD.device, weight_VD.shape[0])
    for rows, logits_CV in _chunks(hidden_TD, weight_VD, bias_V):
        each = zip(logits_CV.split(size), entropy_T[rows].split(size), factor_T[rows].split(size), strict=True)
        for part_PV, entropy_P, factor_P in each:
            log_p_PV = F.log_softmax(part_PV.float() * scale, dim=-1)
            part_PV.copy_(log_p_PV.exp() * (log_p_PV + entropy_P.unsqueeze(-1)) * -factor_P.unsqueeze(-1))
        gradient_TD[rows] = logits_CV @ weight_VD
    return gradient_TD
