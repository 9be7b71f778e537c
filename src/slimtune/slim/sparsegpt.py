"""SparseGPT: weights left out input by input, each error made up for by the inputs that are still to come.

With H = E[x x^T] and U the upper Cholesky factor of its inverse, for each input i in turn:

    gone: those of least w_i^2 / U_ii^2,   e = w_i / U_ii where gone and 0 elsewhere,   w_j -= e U_ij  for all j > i

which lowers ||(W - P) x||^2 over the weights that stay as well as over which of them do. Frantar and Alistarh 2023,
https://arxiv.org/abs/2301.00774. Which weights go is decided for 128 inputs at a time, or for each group of an N:M
pattern when its first input is reached; inputs are taken in their own order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.slim.sparsity import Pattern, beyond_pattern, lowest

_PIECE = 128
"""Inputs among which an unstructured choice is made, as in the paper, and whose errors are carried over one by one."""


@torch.no_grad()
def sparsegpt(
    weight_OI: Tensor, upper_II: Tensor, is_dead_I: Tensor, sparsity: float, pattern: Pattern | None
) -> Tensor:
    """The weight with zeros, float32 (out, in), the others changed to make up for them.

    Args:
        upper_II: U, as `inverse_factor` gives it.
        is_dead_I: inputs that were zero throughout the calibration, whose weights go first.
        sparsity: share of zeros in the matrix.
        pattern: N of M that stay in each group along the input; None for any places.
    """
    # Transposed, so that an input is a row: rows are contiguous, and each step reads and writes one.
    rest_IO = weight_OI.float().t().contiguous()
    inputs, outputs = rest_IO.shape
    diagonal_I = upper_II.diagonal()
    done = 0
    for start in range(0, inputs, _PIECE):
        stop = min(start + _PIECE, inputs)
        gone = torch.zeros_like(rest_IO[start:stop], dtype=torch.bool)
        if pattern is None:
            # Counted from the beginning, so that the rounding of the pieces doesn't add up.
            count = round(sparsity * stop * outputs) - done
            scores = _scores(rest_IO[start:stop], diagonal_I[start:stop], is_dead_I[start:stop])
            gone = lowest(scores.flatten(), count).view_as(gone)
            done += count
        errors = torch.empty_like(rest_IO[start:stop])
        for i in range(start, stop):
            # Not before: the weights of the group carry the errors of all inputs before it by now.
            if pattern is not None and i % pattern.group == 0:
                until = i + pattern.group
                scores_GO = _scores(rest_IO[i:until], diagonal_I[i:until], is_dead_I[i:until])
                gone[i - start : until - start] = beyond_pattern(scores_GO.t(), pattern).t()
            # What stays has no error of its own, and takes those of the inputs before it.
            errors[i - start] = torch.where(gone[i - start], rest_IO[i], 0.0) / diagonal_I[i]
            rest_IO[i].masked_fill_(gone[i - start], 0.0)
            rest_IO[i + 1 : stop].addr_(upper_II[i, i + 1 : stop], errors[i - start], alpha=-1)
        # As in GPTQ: one product (rest, 128) x (128, out) for all inputs beyond the piece.
        rest_IO[stop:].addmm_(upper_II[start:stop, stop:].t(), errors, alpha=-1)
    return rest_IO.t().contiguous()


def _scores(weight_IO: Tensor, diagonal_I: Tensor, is_dead_I: Tensor) -> Tensor:
    """What the output loses by each weight, w^2 / U_ii^2."""
    return (weight_IO / diagonal_I.unsqueeze(1)).square().masked_fill_(is_dead_I.unsqueeze(1), 0.0)
