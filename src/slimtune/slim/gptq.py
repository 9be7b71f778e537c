"""GPTQ: codes chosen input by input, each error made up for by the inputs that are still to come.

With H = E[x x^T] and U the upper Cholesky factor of its inverse, for each input i in turn:

    code_i = round(w_i / scale_i),   e = (w_i - code_i scale_i) / U_ii,   w_j -= e U_ij  for all j > i

which lowers ||(W - Q) x||^2 rather than ||W - Q||^2. Frantar et al., https://arxiv.org/abs/2210.17323. Inputs are taken
in the order of their second moments, the largest first, with scales fixed before, so that columns can be put back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.errors import ConfigError
from slimtune.ops.grid import code_range

DAMPING = 0.01
"""Of the mean diagonal of H, added to it: what calibration hardly saw must not be relied on."""
_PIECE = 128
"""Inputs whose errors are carried over one by one; those beyond take them all at once."""


@torch.no_grad()
def gptq_codes(
    weight_OI: Tensor, scales_OG: Tensor, square_II: Tensor, bits: int, zeros_OG: Tensor | None = None
) -> Tensor:
    """Codes int8 (out, in) for scales and zero points that stay as they are.

    Args:
        weight_OI: of layers with the same inputs, below each other.
        square_II: sum of x x^T, any multiple of it.

    Raises:
        ConfigError: calibration gave nothing that could be factored.
    """
    # The largest inputs first: their errors cost most, and all others are still there to make up for them.
    order = square_II.diagonal().argsort(descending=True)
    upper_II = inverse_factor(square_II[order][:, order])
    group_size = weight_OI.shape[1] // scales_OG.shape[1]
    zeros_OG = torch.zeros_like(scales_OG) if zeros_OG is None else zeros_OG

    def by_input(of_groups_OG: Tensor) -> Tensor:
        return of_groups_OG.float().repeat_interleave(group_size, dim=1)[:, order].t().contiguous()

    # Transposed, so that an input is a row: rows are contiguous, and each step reads and writes one.
    rest_IO = weight_OI.float()[:, order].t().contiguous()
    scales_IO, zeros_IO = by_input(scales_OG), by_input(zeros_OG)
    codes_IO = torch.empty_like(rest_IO, dtype=torch.int8)
    # A group of zeros has the scale 0: its codes are 0 whatever they are divided by, and 0 / 0 is none.
    divisors_IO = torch.where(scales_IO == 0, 1.0, scales_IO)
    lowest, highest = code_range(bits)
    for start in range(0, rest_IO.shape[0], _PIECE):
        stop = min(start + _PIECE, rest_IO.shape[0])
        errors = torch.empty_like(rest_IO[start:stop])
        for i in range(start, stop):
            code = (rest_IO[i] / divisors_IO[i] + zeros_IO[i]).round_().clamp_(lowest, highest)
            codes_IO[i] = code
            errors[i - start] = (rest_IO[i] - (code - zeros_IO[i]) * scales_IO[i]) / upper_II[i, i]
            # Within the piece at once, an outer product for each input: the next code depends on it.
            rest_IO[i + 1 : stop].addr_(upper_II[i, i + 1 : stop], errors[i - start], alpha=-1)
        # Beyond it in one product, (rest, 128) x (128, out): nothing there was read meanwhile.
        rest_IO[stop:].addmm_(upper_II[start:stop, stop:].t(), errors, alpha=-1)
    # Back in the order of the layer's inputs.
    codes_OI = torch.empty_like(codes_IO.t().contiguous())
    codes_OI[:, order] = codes_IO.t()
    return codes_OI


def inverse_factor(square_II: Tensor) -> Tensor:
    """U with U^T U = (H + damping)^-1, upper triangular. Raises: ConfigError."""
    h = square_II.float().clone()
    diagonal = h.diagonal()
    mean = diagonal.mean()
    # Inputs that were zero throughout: any code is right, and H must not be singular.
    diagonal[diagonal == 0] = mean
    # More where float32 finds H not positive: few tokens span few of its dimensions.
    for share in (DAMPING, 0.1, 1.0):
        damped = h + torch.eye(h.shape[0], device=h.device) * (share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        # H^-1 from the factor of H, which is steadier than an inverse by elimination.
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and upper.isfinite().all():
            return upper
    raise ConfigError(
        "the inputs of a layer on the calibration data are not finite, so that GPTQ can't be fitted to them; pass "
        "other data, or method rtn"
    )
