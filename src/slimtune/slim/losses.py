"""How far a student is from its teacher, computed through the head in chunks.

    D_0(p || q) = KL(p || q) = sum_v p_v (log p_v - log q_v)          forward
    D_1(p || q) = KL(q || p)                                          reverse
    D_b(p || q) = b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q

with the teacher's p and the student's q = softmax(z / T). D_b is the generalized Jensen-Shannon divergence of Agarwal
et al. 2024 (arXiv:2306.13649), as TRL has it. The loss of a token is

    alpha T^2 D_b + (1 - alpha) (-log softmax(z)[label])

and T^2 keeps the size of the gradient when T changes (Hinton et al. 2015, arXiv:1503.02531). As in
`ops.cross_entropy`, the logits of a chunk of tokens give their part of the loss and of the hidden state's gradient at
once and are dropped: nothing of the size tokens x vocabulary is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtune.ops.cross_entropy import FLOAT_SHARE, HELD
from slimtune.slim.readout import Readout

LEAST = -1e4
"""The smallest log-probability: 0 * -inf is no number, and exp(-1e4) is 0."""


class Teacher(Protocol):
    """What is known of the teacher's distribution at each learned token."""

    def compare(self, log_q_CV: Tensor, rows: slice, settings: Distance) -> tuple[Tensor, Tensor]:
        """D of each token in `rows`, (C,), and its gradient with respect to z / T, (C, V)."""
        ...


@dataclass(frozen=True)
class Distance:
    """Which divergence, at which temperature, and its share in the loss."""

    beta: float = 0.0
    temperature: float = 1.0
    alpha: float = 1.0


def divergence(log_p_CN: Tensor, log_q_CN: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """D_beta of each row, (C,), and q * dD/dq, (C, N), up to a multiple of q, which no softmax notices."""
    if beta == 0:
        p_CN = log_p_CN.exp()
        return (p_CN * (log_p_CN - log_q_CN)).sum(-1), p_CN.neg_()
    q_CN = log_q_CN.exp()
    if beta == 1:
        slope_CN = (log_q_CN - log_p_CN).mul_(q_CN)
        return slope_CN.sum(-1), slope_CN
    # In logarithms: p and q of a large vocabulary are too small to add and then divide by.
    log_m_CN = torch.logaddexp(log_p_CN + math.log(beta), log_q_CN + math.log1p(-beta))
    # m itself adds nothing to the slope: dD/dm_v = -(b p_v + (1 - b) q_v) / m_v = -1, and changes of m sum to 0.
    slope_CN = (log_q_CN - log_m_CN).mul_(q_CN).mul_(1 - beta)
    of_teacher_C = (log_p_CN.exp() * (log_p_CN - log_m_CN)).sum(-1)
    return beta * of_teacher_C + slope_CN.sum(-1), slope_CN


@dataclass(frozen=True)
class WholeTeacher:
    """The teacher at hand: its last hidden states at the learned tokens, and its head."""

    readout: Readout

    def compare(self, log_q_CV: Tensor, rows: slice, settings: Distance) -> tuple[Tensor, Tensor]:
        """D over the whole vocabulary, and its gradient."""
        # Logits beyond the shared tokens are padding of the teacher's own vocabulary.
        z_CV = self.readout.logits(rows)[:, : log_q_CV.shape[1]].to(log_q_CV)
        log_p_CV = F.log_softmax(z_CV / settings.temperature, dim=-1).clamp_(min=LEAST)
        distance_C, slope_CV = divergence(log_p_CV, log_q_CV, settings.beta)
        # Through the softmax: dD/dz_j = w_j - q_j sum_i w_i, with w = q * dD/dq.
        return distance_C, slope_CV.sub_(log_q_CV.exp().mul_(slope_CV.sum(-1, keepdim=True)))


@dataclass(frozen=True)
class TopKTeacher:
    """What was stored of the teacher: its likeliest tokens, some drawn from all the others, and the others' mass r.

    The forward divergence over the whole vocabulary is estimated without bias, value and gradient (as in Anshumann et
    al. 2025, arXiv:2503.16870): a likely token counts p, each of n that were drawn from the others by p counts r / n.

        KL(p || q) ~ sum_top p (log p - log q) + r / n sum_drawn (log p - log q)

    The other divergences, whose ratio q / p has no bound, take the others as one outcome. That is a divergence of its
    own, never above the whole one; for tokens that were not drawn at all it is the forward one as well.

    Attributes:
        ids: (N, k), the likeliest first and then those drawn.
        log_probs: (N, k), at the temperature of the loss.
        rest: (N,), the log of the others' mass.
        drawn: how many of k were drawn, n.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor
    drawn: int = 0

    def compare(self, log_q_CV: Tensor, rows: slice, settings: Distance) -> tuple[Tensor, Tensor]:
        """D of what is stored, and its gradient over the whole vocabulary."""
        if settings.beta == 0 and self.drawn:
            return self._estimate(log_q_CV, rows)
        top = self.ids.shape[1] - self.drawn
        ids_Ck = self.ids[rows, :top].long()
        stored = torch.cat([self.log_probs[rows, :top], self.rest[rows].unsqueeze(-1)], dim=-1)
        log_p_CN = stored.to(log_q_CV).clamp_(min=LEAST)
        q_CV, top_Ck = log_q_CV.exp(), log_q_CV.gather(-1, ids_Ck)
        # Summed up and not 1 - sum of the top: of a mass of 1e-9 no digit would be left.
        rest_C1 = q_CV.scatter(-1, ids_Ck, 0.0).sum(-1, keepdim=True)
        log_q_CN = torch.cat([top_Ck, rest_C1.log().clamp(min=LEAST)], dim=-1)
        distance_C, slope_CN = divergence(log_p_CN, log_q_CN, settings.beta)
        total_C1, of_rest_C1 = slope_CN.sum(-1, keepdim=True), slope_CN[:, -1:]
        # A token of the rest has its share q_j / rest of the slope of that outcome.
        share_C1 = torch.where(rest_C1 > 0, of_rest_C1 / rest_C1, 0.0)
        slope_CV = q_CV * (share_C1 - total_C1)
        return distance_C, slope_CV.scatter_(-1, ids_Ck, slope_CN[:, :-1] - top_Ck.exp() * total_C1)

    def _estimate(self, log_q_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        ids_Ck, top = self.ids[rows].long(), self.ids.shape[1] - self.drawn
        log_p_Ck = self.log_probs[rows].to(log_q_CV).clamp(min=LEAST)
        weights_Ck = log_p_Ck.exp()
        weights_Ck[:, top:] = (self.rest[rows].to(log_q_CV).exp() / self.drawn).unsqueeze(-1)
        distance_C = (weights_Ck * (log_p_Ck - log_q_CV.gather(-1, ids_Ck))).sum(-1)
        # dD/dz_j = q_j sum_i w_i - w_j; a token may have been drawn several times.
        slope_CV = log_q_CV.exp().mul_(weights_Ck.sum(-1, keepdim=True))
        return distance_C, slope_CV.scatter_add_(-1, ids_Ck, -weights_Ck)


def distillation_loss(student: Readout, teacher: Teacher, labels_N: Tensor, distance: Distance, width: int) -> Tensor:
    """The loss summed over all tokens: (), differentiable in the hidden states and in what of the head is trained.

    Args:
        student: its last hidden states at the learned tokens, (N, features).
        labels_N: the tokens that the data has there.
        width: how many tokens both have, V; logits beyond them are padding of the vocabulary.
    """
    total: Any = _Chunked.apply(student, teacher, labels_N, distance, width, student.hidden, *student.parameters)
    return total


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Readout, teacher: Teacher, labels_N: Tensor, distance: Distance, width: int,
        hidden_ND: Tensor, *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=hidden_ND.device)
        wanted = [t for t, needed in zip((hidden_ND, *parameters), ctx.needs_input_grad[5:], strict=True) if needed]
        gradients = [torch.zeros_like(tensor) for tensor in wanted]
        # A chunk of C tokens has logits of (C, V) in the head's dtype.
        chunk = max(FLOAT_SHARE, HELD.get(hidden_ND.device.type, HELD["cuda"]) // width)
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, min(start + chunk, hidden_ND.shape[0]))
            with torch.enable_grad():
                hidden_CD = hidden_ND[rows].detach().requires_grad_(ctx.needs_input_grad[5])
                z_CV = student.head(hidden_CD)[:, :width]
            slope_CV = torch.empty_like(z_CV)
            # What is in float32 is several times the chunk's logits: over an eighth of the chunk at a time.
            part = max(1, chunk // FLOAT_SHARE)
            for first in range(rows.start, rows.stop, part):
                at = slice(first, min(first + part, rows.stop))
                inside = slice(at.start - start, at.stop - start)
                total += _loss_and_slope(z_CV.detach()[inside], slope_CV[inside], teacher, labels_N[at], at, distance)
            if wanted:
                inputs = [hidden_CD] * ctx.needs_input_grad[5] + [t for t in wanted if t is not hidden_ND]
                of_chunk = torch.autograd.grad(z_CV, inputs, slope_CV)
                for tensor, whole, own in zip(wanted, gradients, of_chunk, strict=True):
                    (whole[rows] if tensor is hidden_ND else whole).add_(own)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = gradients
        # What backward receives for a sum is one number, which the whole gradient is multiplied by.
        own = iter(ctx.saved_tensors)
        wanted: Sequence[bool] = ctx.needs_input_grad
        return tuple((g := next(own)) * gradient.to(g.dtype) if needed else None for needed in wanted)


def _loss_and_slope(
    z_CV: Tensor, slope_CV: Tensor, teacher: Teacher, labels_C: Tensor, rows: slice, distance: Distance
) -> Tensor:
    """The summed loss of some tokens; their gradient with respect to z is written into `slope_CV`."""
    alpha, temperature = distance.alpha, distance.temperature
    z_CV = z_CV.to(torch.promote_types(z_CV.dtype, torch.float32))
    log_q_CV = F.log_softmax(z_CV / temperature, dim=-1)
    distance_C, of_teacher_CV = teacher.compare(log_q_CV, rows, distance)
    loss = alpha * temperature**2 * distance_C.sum()
    # d(z / T)/dz = 1 / T, of the T^2 in front.
    of_teacher_CV.mul_(alpha * temperature)
    if alpha < 1:
        log_q_CV = log_q_CV if temperature == 1 else F.log_softmax(z_CV, dim=-1)
        labels_C1 = labels_C.unsqueeze(-1)
        loss = loss - (1 - alpha) * log_q_CV.gather(-1, labels_C1).sum()
        of_teacher_CV.add_(log_q_CV.exp(), alpha=1 - alpha)
        of_teacher_CV.scatter_add_(-1, labels_C1, of_teacher_CV.new_full((), alpha - 1).expand_as(labels_C1))
    slope_CV.copy_(of_teacher_CV)
    return loss


def label_loss(z_NL: Tensor, teacher_NL: Tensor, labels_N: Tensor, distance: Distance) -> Tensor:
    """The same loss over few classes, summed over N texts or tokens: plain, for their logits are small."""
    log_q = F.log_softmax(z_NL.float() / distance.temperature, dim=-1)
    log_p = F.log_softmax(teacher_NL.float() / distance.temperature, dim=-1)
    apart = plain_divergence(log_p, log_q, distance.beta).sum() * distance.temperature**2
    return distance.alpha * apart + (1 - distance.alpha) * F.cross_entropy(z_NL.float(), labels_N, reduction="sum")


def plain_divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """D_beta over the last dimension, differentiable by autograd."""
    kl: Callable[[Tensor, Tensor], Tensor] = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    if beta in (0, 1):
        return kl(log_q, log_p) if beta else kl(log_p, log_q)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
