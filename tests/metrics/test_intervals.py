"""Intervals against scipy, and what they must hold."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from slimtune.metrics.intervals import bootstrap, interval_of_mean, interval_of_share, wilson


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (1, 3), (83, 100), (999, 1000)])
def test_wilson_against_scipy(right: int, count: int) -> None:
    theirs = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right, count) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    assert wilson(right, count)[0] <= right / count <= wilson(right, count)[1]


def test_shares_get_wilsons_and_other_scores_a_bootstrap() -> None:
    assert interval_of_mean([1.0, 0.0, 1.0]) == wilson(2, 3)
    values = np.random.default_rng(1).random(400)
    low, high = interval_of_mean(values.tolist())
    error = values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=error / 3)


def test_the_same_scores_give_the_same_interval() -> None:
    assert interval_of_mean([0.2, 0.5, 0.9]) == interval_of_mean([0.2, 0.5, 0.9])
    assert bootstrap(lambda chosen: float(len(chosen)), 7) == (7, 7)


def test_that_all_is_right_is_not_quite_sure() -> None:
    values = np.array([1.0] * 9 + [0.0])
    assert interval_of_share(lambda chosen: float(values[chosen].mean()), 9) == wilson(9, 9)
    assert interval_of_share(lambda chosen: 0.0, 9) == wilson(0, 9)
    share = interval_of_share(lambda chosen: float(values[chosen].mean()), 10)
    assert share == bootstrap(lambda chosen: float(values[chosen].mean()), 10)
