"""Singular values of what tuning did to a matrix: ranks, overlaps and intruder dimensions.

For a matrix W (out, in), tuned to W' = W + dW with the singular values s_1 >= s_2 >= ... of dW:

- effective rank: exp(-sum_i p_i ln p_i) with p_i = s_i / sum_j s_j (Roy & Vetterli 2007);
- stable rank: sum_i s_i^2 / s_1^2;
- relative norm: ||dW||_F / ||W||_F;
- overlap of two updates: phi(i, j) = ||U_i^T V_j||_F^2 / min(i, j), with U_i the first i singular vectors of one and
  V_j the first j of the other: 1 for the same subspace, 0 for orthogonal ones, about max(i, j) / d by chance (Hu et al.
  2021, arXiv:2106.09685, section 7.2);
- intruder dimensions: of the first k left singular vectors y_j of W', those whose largest |cos(y_j, x_i)| with all left
  singular vectors x_i of W is below epsilon (Shuttleworth et al. 2024, arXiv:2410.21228, algorithm 1). The paper looks
  at k = 10, and its authors generally use epsilon = 0.5.

All decompositions are `torch.linalg.svd`'s in float32; those of a LoRA's update are of its factors, through QR.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TOP = 10
"""k, of the paper."""
EPSILON = 0.5


class Decomposition(NamedTuple):
    """U_OK, s_K and V_IK with U diag(s) V^T = W; s falls."""

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """How many singular values are more than rounding."""
        if not self.values.numel():
            return 0
        # The bound of numpy's matrix_rank.
        bound = self.values[0] * max(len(self.left), len(self.right)) * torch.finfo(self.values.dtype).eps
        return int((self.values > bound).sum())


def decompose(weight_OI: Tensor) -> Decomposition:
    """The thin singular value decomposition of a matrix."""
    left, values, right = torch.linalg.svd(weight_OI, full_matrices=False)
    return Decomposition(left, values, right.mT)


def decompose_product(b_OR: Tensor, a_RI: Tensor) -> Decomposition:
    """That of B A, from the factors alone: B = Q R, A^T = P S, and R S^T is a small matrix."""
    # (out, r) and (in, r) instead of an (out, in) product: O((out + in) r^2), where the full SVD is cubic.
    q_OR, r = torch.linalg.qr(b_OR)
    p_IR, s = torch.linalg.qr(a_RI.mT)
    small = decompose(r @ s.mT)
    return Decomposition(q_OR @ small.left, small.values, p_IR @ small.right)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of singular values that are scaled to sum to 1; 0 where all are 0."""
    total = values.double().sum()
    if total == 0:
        return 0.0
    p = values.double() / total
    return float(torch.special.entr(p).sum().exp())


def stable_rank(values: Tensor) -> float:
    """sum_i s_i^2 / s_1^2; 0 where all are 0."""
    largest = values.double().max() if values.numel() else torch.tensor(0.0)
    return float((values.double() / largest).square().sum()) if largest > 0 else 0.0


def overlap(first_DI: Tensor, second_DJ: Tensor) -> float:
    """phi = ||U^T V||_F^2 / min(i, j) for orthonormal columns U (d, i) and V (d, j); 0 where there are none."""
    fewest = min(first_DI.shape[1], second_DJ.shape[1])
    return float((first_DI.mT @ second_DJ).double().square().sum()) / fewest if fewest else 0.0


def nearest_cosines(after_OK: Tensor, before_OD: Tensor) -> Tensor:
    """max_i |cos(y_j, x_i)| for each column y_j of the one and all columns x_i of the other, both orthonormal: (k,)."""
    # (k, in-many) cosines: columns have unit length, and the sign of a singular vector is free.
    return (after_OK.mT @ before_OD).abs().amax(1)


def intruders(after: Decomposition, before_left_OD: Tensor, top: int = TOP, epsilon: float = EPSILON) -> list[int]:
    """Which of the first `top` left singular vectors of W' are like none of W."""
    cosines = nearest_cosines(after.left[:, :top], before_left_OD)
    return (cosines < epsilon).nonzero().flatten().tolist()
