"""Where the factors of a low-rank change start: pure functions of the base weight and of random draws."""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.errors import warn

Factors = tuple[Tensor, Tensor]
"""(A, B)."""


def warn_of_rank(r: int, rows: int, columns: int) -> None:
    """Say of a new adapter's rank that the matrix can't have it; `peft` takes it, so that files have such ranks."""
    if r > min(rows, columns):
        # Without the layer's name: said once for all layers of this shape.
        warn(
            f"the rank {r} is beyond a {rows} x {columns} matrix: whatever it learns has at most rank "
            f"{min(rows, columns)}; choose a lower r, or give such layers a rank of their own in rank_pattern"
        )


def principal(weight_OI: Tensor, r: int, scaling: float, how: str) -> Factors:
    """Factors (A, B) of a part of the weight: by PiSSA, or by OLoRA, which takes no notice of the scale.

    Args:
        how: "pissa", "pissa_niter_[number]" or "olora".
    """
    if how == "olora":
        return olora(weight_OI, r)
    return pissa(weight_OI, r, scaling, int(how.rpartition("_")[2]) if "niter" in how else None)


def pissa(weight_OI: Tensor, r: int, scaling: float, power_iterations: int | None = None) -> Factors:
    """The greatest r singular values with their vectors, so that s B A is the best approximation of rank r.

    W = U S V^T,  A = sqrt(S_r / s) V_r^T,  B = U_r sqrt(S_r / s)

    Args:
        power_iterations: use a randomised decomposition with so many iterations.

    Meng et al. 2024, arXiv:2404.02948.
    """
    if power_iterations is None:
        # All K = min(out, in) directions, of which r are kept: exact, and slow for a wide layer.
        u_OK, sigma_K, vt_KI = torch.linalg.svd(wide(weight_OI), full_matrices=False)
    else:
        # r directions alone, found by a random projection that each iteration makes sharper.
        u_OK, sigma_K, v_IK = torch.svd_lowrank(wide(weight_OI), r, niter=power_iterations)
        vt_KI = v_IK.t()
    # Half of each singular value in either factor, and s divided out of both: s B A is U_r S_r V_r^T.
    root_R = (sigma_K[:r] / scaling).sqrt()
    return root_R[:, None] * vt_KI[:r], u_OK[:, :r] * root_R


def olora(weight_OI: Tensor, r: int) -> Factors:
    """The first r directions of W = Q R: A = R_r, B = Q_r. Büyükakyüz 2024, arXiv:2406.01775."""
    q_OK, r_KI = torch.linalg.qr(wide(weight_OI))
    return r_KI[:r], q_OK[:, :r]


def mica(weight_OI: Tensor, r: int) -> Factors:
    """MiCA: A = 0, and B the left singular vectors of the r smallest singular values (arXiv:2604.01694)."""
    u_OK, _, _ = torch.linalg.svd(wide(weight_OI), full_matrices=False)
    # torch sorts singular values downwards: the last r columns of U are the least ones.
    return u_OK.new_zeros(r, weight_OI.shape[1]), u_OK[:, -r:]


def orthogonal(weight_OI: Tensor, r: int) -> Factors:
    """Random A and B with B A = 0 though neither is zero: they use the even and the odd rows of one rotation."""
    rows, columns = weight_OI.shape
    # Even rows of a rotation are orthogonal to odd ones, so that B A = R Q_odd Q_even^T P = 0 for any R and P.
    q_RR, _ = torch.linalg.qr(torch.randn(r, r))
    # / 10 keeps the entries near those of a usual start; the zero product holds for any factor.
    a_RI = torch.randn(columns, r // 2).mm(q_RR[0::2]).t() / 10
    b_OR = torch.randn(r // 2, rows).t().mm(q_RR[1::2]) / 10
    return a_RI, b_OR


def wide(weight: Tensor) -> Tensor:
    """The weight in float32 at least: a decomposition in 16 bits has no digits, or no kernel."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
