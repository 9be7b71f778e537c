"""How sure a score is, given how many questions it rests on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Z = 1.959964
"""The 97.5% point of the normal distribution: intervals are of 95%."""
RESAMPLES = 1000


def interval_of_mean(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the mean of one score a question: Wilson's for 0 and 1, else by bootstrap."""
    if all(value in (0, 1) for value in values):
        return wilson(int(sum(values)), len(values))
    # Not normal theory: scores such as ROUGE pile up at 0 and 1, where mean +- 1.96 SE would leave [0, 1].
    scores_N = np.asarray(values, dtype=float)
    return bootstrap(lambda chosen: float(scores_N[chosen].mean()), len(values))


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927): (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
    # Wilson solves |p - share| = z sqrt(share (1 - share) / n) for the share, so that 0 of n has an upper bound above
    # 0.
    p, spread = right / count, Z**2 / count
    half = Z * math.sqrt(p * (1 - p) / count + spread / (4 * count))
    low, high = ((p + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1))
    # Rounding must not put the bound on the wrong side of a share of 0 or 1.
    return max(0.0, min(low, p)), min(1.0, max(high, p))


def interval_of_share(score: Callable[[np.ndarray], float], count: int) -> tuple[float, float]:
    """The 95% interval of a score from 0 to 1 over all questions at once, such as F1: by bootstrap.

    Where everything is right, or everything wrong, no draw differs from another; Wilson's formula then says how much so
    many questions can tell.
    """
    value = score(np.arange(count))
    return wilson(round(value) * count, count) if value in (0, 1) else bootstrap(score, count)


def bootstrap(score: Callable[[np.ndarray], float], count: int, seed: int = 0) -> tuple[float, float]:
    """The 2.5% and 97.5% points of a score over questions drawn with replacement (Efron 1979).

    Args:
        score: of the questions of these numbers, an array of `count` whole numbers in which some recur.
    """
    # A fixed seed: the same answers always have the same interval. Percentiles need no assumption on symmetry.
    draw = np.random.default_rng(seed)
    values = [score(draw.integers(count, size=count)) for _ in range(RESAMPLES)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
