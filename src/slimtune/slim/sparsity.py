"""Which weights of a matrix go: those of the least scores, in a row, a matrix or the model, or by an N:M pattern."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Of each `group` inputs one behind the other, `kept` have a weight in each row: 2:4."""

    kept: int
    group: int


PATTERNS = {"unstructured": None, "2:4": Pattern(2, 4), "4:8": Pattern(4, 8)}


def lowest(scores_N: Tensor, count: int) -> Tensor:
    """Where the `count` lowest scores are; of equal ones the first, so that it is exactly so many."""
    if not count:
        return torch.zeros_like(scores_N, dtype=torch.bool)
    # By the threshold and not by sorting: scores_N may be all weights of a model.
    threshold = scores_N.kthvalue(count).values
    gone = scores_N < threshold
    ties = (scores_N == threshold).nonzero().squeeze(1)
    gone[ties[: count - int(gone.sum())]] = True
    return gone


def lowest_in_rows(scores_OI: Tensor, count: int) -> Tensor:
    """Where the `count` lowest scores of each row are."""
    gone = torch.zeros_like(scores_OI, dtype=torch.bool)
    # Stable, so that of equal scores the first go, as they do in a matrix.
    return gone.scatter_(1, scores_OI.argsort(dim=1, stable=True)[:, :count], value=True)


def beyond_pattern(scores_OI: Tensor, pattern: Pattern) -> Tensor:
    """Where weights are beyond the N of highest score in their group of M inputs."""
    groups = scores_OI.reshape(-1, pattern.group)
    return lowest_in_rows(groups, pattern.group - pattern.kept).view(scores_OI.shape)
