"""Intervals, tests and corrections against scipy, against counting, and by simulation of what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from slimtune.errors import DataError
from slimtune.metrics import seeds as statistics
from slimtune.metrics.seeds import (
    SeedScores,
    compare_all,
    detectable,
    difference,
    holm,
    interval,
    paired_p,
    spread,
)


def table(seeds: int, questions: int, of_seeds: float, of_questions: float, rest: float, rng: object) -> np.ndarray:
    draw = rng.normal  # type: ignore[attr-defined]
    effects = draw(0, of_seeds, (seeds, 1)) + draw(0, of_questions, (1, questions))
    return effects + draw(0, rest, (seeds, questions))


def test_one_seed_is_the_t_interval_over_questions() -> None:
    scores = np.random.default_rng(0).normal(0.4, 0.2, (1, 50))
    found = interval(scores)
    expected = stats.t.interval(0.95, 49, scores.mean(), stats.sem(scores[0]))
    assert (found.low, found.high) == pytest.approx(expected)


def test_seeds_that_alone_differ_are_the_t_interval_over_seeds() -> None:
    by_seed = np.array([0.2, 0.5, 0.9])
    found = interval(np.repeat(by_seed[:, None], 40, 1))
    expected = stats.t.interval(0.95, 2, by_seed.mean(), stats.sem(by_seed))
    assert (found.low, found.high) == pytest.approx(expected)


def test_the_variance_is_that_of_a_new_draw_of_seeds_and_questions() -> None:
    rng = np.random.default_rng(0)
    tables = [table(4, 30, 0.3, 0.5, 0.7, rng) for _ in range(2000)]
    true = np.var([one.mean() for one in tables])
    assert np.mean([spread(one).variance for one in tables]) == pytest.approx(true, rel=0.12)


def test_shares_of_one_seed_have_clopper_and_pearsons_interval() -> None:
    scores = np.array([[1.0] * 37 + [0.0] * 23])
    exact = stats.binomtest(37, 60).proportion_ci(0.95, method="exact")
    found = interval(scores)
    # The variance is that of n - 1, so the number of questions counts as one less.
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=0.003)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_alike_is_no_certainty(value: float) -> None:
    found = interval(np.full((3, 100), value))
    exact = stats.binomtest(int(100 * value), 100).proportion_ci(0.95, method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    assert found.high - found.low > 0.03


def test_intervals_hold_what_they_promise() -> None:
    rng = np.random.default_rng(1)
    found = [interval(table(3, 40, 0.3, 0.6, 0.6, rng)) for _ in range(1500)]
    assert np.mean([one.low <= 0 <= one.high for one in found]) >= 0.93


@pytest.mark.parametrize(("seeds", "at_least", "at_most"), [(1, 0.15, 0.35), (3, 0.02, 0.09), (5, 0.02, 0.07)])
def test_how_often_no_difference_is_called_one(
    seeds: int, at_least: float, at_most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About one time of twenty; one seed alone, which knows nothing of others, one time of four."""
    monkeypatch.setattr(statistics, "PERMUTATIONS", 500)
    rng, wrong = np.random.default_rng(2), 0
    for _ in range(600):
        easy = rng.normal(0, 1.5, 60)
        first, second = (
            rng.random((seeds, 60)) < 1 / (1 + np.exp(-easy - rng.normal(0, 0.5, (seeds, 1)))) for _ in range(2)
        )
        wrong += paired_p(first.astype(float) - second)[0] < 0.05
    assert at_least <= wrong / 600 <= at_most


def test_one_seed_of_right_and_wrong_is_mcnemars() -> None:
    differences = np.array([[1.0] * 9 + [-1.0] * 2 + [0.0] * 40])
    p, name = paired_p(differences)
    assert p == pytest.approx(stats.binomtest(9, 11).pvalue)
    assert name == "McNemar, exact"


def test_one_seed_of_other_scores_flips_signs() -> None:
    values = np.array([0.3, 0.1, 0.25, -0.05, 0.4, 0.2])
    expected = stats.permutation_test((values,), np.sum, permutation_type="samples", alternative="two-sided").pvalue
    assert paired_p(values[None])[0] == pytest.approx(expected)


def test_equal_answers_differ_in_nothing() -> None:
    assert paired_p(np.zeros((1, 20)))[0] == 1.0
    assert paired_p(np.zeros((3, 20)))[0] == 1.0


def test_a_difference_everywhere_is_shown_though_nothing_varies() -> None:
    assert paired_p(np.ones((3, 60)))[0] < 0.001


def test_seeds_that_disagree_show_nothing() -> None:
    """Two thirds of the questions won, but by two seeds of three: another one might lose."""
    differences = np.repeat(np.array([[0.5], [0.4], [-0.3]]), 80, 1)
    assert paired_p(differences)[0] > 0.3


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03, 0.5]) == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert holm([]) == []


def test_what_is_detectable_is_seen_four_times_of_five(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PERMUTATIONS", 500)
    rng = np.random.default_rng(3)
    least = np.median([detectable(table(3, 60, 0.05, 0.3, 0.3, rng)) for _ in range(200)])
    seen = [paired_p(table(3, 60, 0.05, 0.3, 0.3, rng) + least)[0] < 0.05 for _ in range(200)]
    assert 0.7 <= np.mean(seen) <= 0.9


def test_five_questions_are_too_few_to_be_detected() -> None:
    assert detectable(np.zeros((1, 50))) == pytest.approx(6 / 50)
    assert paired_p(np.array([[1.0] * 5 + [0.0] * 45]))[0] > 0.05
    assert paired_p(np.array([[1.0] * 6 + [0.0] * 44]))[0] < 0.05


def test_sides_are_paired_by_seed_and_a_side_without_seeds_with_all() -> None:
    seeded = SeedScores({0: [1, 1], 2: [0, 1]})
    np.testing.assert_array_equal(difference(seeded, SeedScores({2: [1, 1], 3: [0, 0]})), [[-1, 0]])
    np.testing.assert_array_equal(difference(SeedScores({0: [1, 0]}, is_seeded=False), seeded), [[0, -1], [1, -1]])
    np.testing.assert_array_equal(difference(seeded, SeedScores({0: [1, 0]}, is_seeded=False)), [[0, 1], [-1, 1]])


@pytest.mark.parametrize("other", [SeedScores({5: [1, 1]}), SeedScores({0: [1, 1, 1]})])
def test_what_has_nothing_in_common_is_refused(other: SeedScores) -> None:
    with pytest.raises(DataError, match="in common"):
        difference(SeedScores({0: [1, 1]}), other)


def test_a_single_question_has_no_interval() -> None:
    with pytest.raises(DataError, match="at least 2 questions"):
        interval(np.array([[1.0]]))


def test_pairs_are_corrected_for_all_that_were_asked() -> None:
    rng = np.random.default_rng(4)
    scores = {name: SeedScores({s: rng.random(30).tolist() for s in range(3)}) for name in "abc"}
    pairs = compare_all(scores)
    assert [(pair.first, pair.second) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [pair.adjusted for pair in pairs] == holm([pair.p_value for pair in pairs])
    assert all(math.isfinite(pair.detectable) for pair in pairs)
    assert not any(pair.is_shown for pair in pairs)


@pytest.mark.parametrize(
    ("table", "variance", "freedom"),
    [
        # MS_seeds 121/6 beats MS_questions 1/6 with MS_rest 7/6: their sum less the rest is below MS_seeds alone.
        ([[0, 1, 0], [4, 3, 5]], 121 / 6 / 6, 1),
        # The other way around: MS_questions 49/6, MS_seeds 0, MS_rest 1/2.
        ([[0, 4, 1], [1, 4, 0]], 49 / 6 / 6, 2),
        # Where both are below the rest, the difference would be a negative variance.
        ([[1, 0], [0, 1]], 0.0, 1),
    ],
)
def test_the_larger_mean_square_counts_where_their_sum_falls_below_it(
    table: list[list[float]], variance: float, freedom: float
) -> None:
    scores_SQ = np.array(table, dtype=float)
    seeds, questions = scores_SQ.shape
    of_questions = seeds * scores_SQ.mean(0).var(ddof=1)
    of_seeds = questions * scores_SQ.mean(1).var(ddof=1)
    result = spread(scores_SQ)
    assert result.variance == pytest.approx(max(of_seeds, of_questions) / scores_SQ.size)
    assert result.variance == pytest.approx(variance)
    assert result.freedom == freedom


def test_the_freedom_of_three_mean_squares_by_hand() -> None:
    """MS_seeds 27/2 with 1 degree of freedom, MS_questions 49/6 with 2, MS_rest 1/2 with 2."""
    result = spread(np.array([[1.0, 2, 4], [3, 5, 8]]))
    assert result.variance == pytest.approx(127 / 6 / 6)
    assert result.freedom == pytest.approx((127 / 6) ** 2 / (13.5**2 + (49 / 6) ** 2 / 2 + 0.5**2 / 2), rel=1e-9)


def test_no_p_value_is_zero() -> None:
    """Thirty differences of one sign: no draw of signs is as extreme, and the observed one is counted itself."""
    p, test = paired_p(np.full((1, 30), 0.25))
    assert test == "sign-flip permutation over questions"
    assert p == pytest.approx(1 / 20_001, rel=1e-9)
    several, _ = paired_p(np.full((3, 30), 0.25))
    assert several == pytest.approx(1 / 20_001, rel=1e-9)
