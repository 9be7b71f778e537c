"""What scores of several seeds on the same questions say: intervals, paired tests, what could have been seen at all.

Scores are tables x_SQ of S seeds on Q questions, crossed: every seed answers every question. New seeds and new
questions would both have given another mean, so both enter its variance (two-way random effects; Brennan,
*Generalizability Theory*, 2001):

    Var(mean) = (MS_seeds + MS_questions - MS_rest) / (S Q)

with degrees of freedom after Satterthwaite (1946). One seed alone leaves MS_questions / Q, and says nothing of others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slimtune.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    Table = np.ndarray

LEVEL = 0.05
"""Of tests; intervals hold 95%."""
POWER = 0.8
"""With which the minimum detectable difference would have been seen."""
PERMUTATIONS = 20_000


@dataclass(frozen=True)
class SeedScores:
    """A candidate's scores per question by seed; a candidate without seeds (the model as it comes) has one entry."""

    by_seed: Mapping[int, Sequence[float]]
    is_seeded: bool = True

    @property
    def table(self) -> Table:
        """x_SQ."""
        import numpy as np

        return np.array(list(self.by_seed.values()), dtype=float)

    def of(self, seed: int) -> Sequence[float]:
        """Of one seed."""
        return self.by_seed[seed] if self.is_seeded else next(iter(self.by_seed.values()))


@dataclass(frozen=True)
class MeanVariance:
    """The variance of a mean, and its degrees of freedom."""

    variance: float
    freedom: float


@dataclass(frozen=True)
class MeanInterval:
    """A mean with its 95% interval, over `seeds` seeds and `questions` questions."""

    mean: float
    low: float
    high: float
    seeds: int
    questions: int


@dataclass(frozen=True)
class PairedTest:
    """Two candidates on the same questions.

    Attributes:
        difference: the mean of `first` less that of `second`.
        p_value: of no difference, two-sided; `adjusted` after Holm over all pairs that were asked.
        detectable: the smallest difference that this many questions and seeds would have shown with 80% power.
        test: which one it was.
    """

    first: str
    second: str
    difference: float
    p_value: float
    adjusted: float
    detectable: float
    test: str

    @property
    def is_shown(self) -> bool:
        """Whether a difference was shown."""
        return self.adjusted < LEVEL


def spread(scores_SQ: Table) -> MeanVariance:
    """Var(mean) of a crossed table of seeds and questions; raises DataError below two questions."""
    import numpy as np

    seeds, questions = scores_SQ.shape
    if questions < 2:
        raise DataError(f"an interval needs at least 2 questions, found {questions}")
    # Mean squares of the table x_SQ without replication. Rows and columns: MS_questions = S * var(column means),
    # MS_seeds = Q * var(row means), each with its degrees of freedom, Q - 1 and S - 1.
    of_questions = seeds * np.var(scores_SQ.mean(0), ddof=1)
    if seeds == 1:
        return MeanVariance(float(of_questions / questions), questions - 1)
    of_seeds = questions * np.var(scores_SQ.mean(1), ddof=1)
    # Residuals e_SQ = x_SQ - row mean - column mean + grand mean, with (S - 1)(Q - 1) degrees of freedom: the
    # interaction of seed and question, which both mean squares contain once and the sum of them twice.
    rest = scores_SQ - scores_SQ.mean(0) - scores_SQ.mean(1, keepdims=True) + scores_SQ.mean()
    of_rest = (rest**2).sum() / ((seeds - 1) * (questions - 1))
    both = of_seeds + of_questions - of_rest
    # The difference of estimates may fall below either of them, where only chance can be the cause: the larger counts.
    if both <= max(of_seeds, of_questions):
        both, freedom = max((of_seeds, seeds - 1), (of_questions, questions - 1))
    else:
        # Satterthwaite (1946): the freedom of sum_i a_i MS_i is (sum_i a_i MS_i)^2 / sum_i (a_i MS_i)^2 / f_i; the
        # third mean square enters with a = -1, whose square is as large as the others.
        parts = of_seeds**2 / (seeds - 1) + of_questions**2 / (questions - 1)
        freedom = both**2 / (parts + of_rest**2 / ((seeds - 1) * (questions - 1)))
    # A mean square is S Q times the part of the grand mean's variance that it stands for.
    return MeanVariance(float(both / scores_SQ.size), float(freedom))


def interval(scores_SQ: Table) -> MeanInterval:
    """The mean with its 95% interval.

    Of shares (scores of 0 and 1) the interval of Korn and Graubard (1998): Clopper-Pearson's for the number of
    questions that would have this variance, so that 100 of 100 is not 1.0 to 1.0. Otherwise mean +- t * sqrt(Var).
    """
    from scipy import stats

    mean, spread_of_mean = float(scores_SQ.mean()), spread(scores_SQ)
    seeds, questions = scores_SQ.shape
    if is_share(scores_SQ):
        low, high = _share_interval(mean, spread_of_mean, questions)
    else:
        half = float(stats.t.ppf(1 - LEVEL / 2, spread_of_mean.freedom)) * math.sqrt(spread_of_mean.variance)
        low, high = mean - half, mean + half
    return MeanInterval(mean, low, high, seeds, questions)


def is_share(scores_SQ: Table) -> bool:
    """Whether every score is 0 or 1."""
    import numpy as np

    return bool(np.isin(scores_SQ, (0.0, 1.0)).all())


def compare_all(scores: Mapping[str, SeedScores], pairs: Sequence[tuple[str, str]] | None = None) -> list[PairedTest]:
    """Each pair tested, with Holm's correction over all of them; every pair of the names if none are given."""
    pairs = list(itertools.combinations(scores, 2)) if pairs is None else pairs
    tested = [_tested(first, second, difference(scores[first], scores[second])) for first, second in pairs]
    adjusted = holm([pair.p_value for pair in tested])
    return [replace(pair, adjusted=value) for pair, value in zip(tested, adjusted, strict=True)]


def difference(first: SeedScores, second: SeedScores) -> Table:
    """d_SQ = first - second, seed by seed where both have it; a side without seeds stands against every seed.

    Raises: DataError, if they did not answer the same questions, or have no seed in common.
    """
    import numpy as np

    seeds = [seed for seed in first.by_seed if seed in second.by_seed or not second.is_seeded]
    if not first.is_seeded:
        seeds = list(second.by_seed)
    rows = [(first.of(seed), second.of(seed)) for seed in seeds]
    if not rows or any(len(one) != len(other) for one, other in rows):
        raise DataError(
            "two candidates without a seed or without questions in common can't be compared; run both again"
        )
    return np.array([one for one, _ in rows]) - np.array([other for _, other in rows])


def paired_p(differences_SQ: Table) -> tuple[float, str]:
    """The two-sided p-value of no difference, and the name of the test.

    One seed: McNemar's exact test for right and wrong, else a sign-flip permutation over the questions. Several: t over
    seeds and questions, and never below the permutation, which needs no normal distribution.
    """
    from scipy import stats

    # d_Q: the questions are what is exchangeable under the null hypothesis; seeds of one question are not independent.
    by_question = differences_SQ.mean(0)
    if differences_SQ.shape[0] == 1 and set(by_question.tolist()) <= {-1.0, 0.0, 1.0}:
        wins, losses = int((by_question > 0).sum()), int((by_question < 0).sum())
        # Questions on which both are right or both are wrong say nothing of the difference (McNemar 1947).
        p = 1.0 if wins + losses == 0 else float(stats.binomtest(wins, wins + losses).pvalue)
        return p, "McNemar, exact"
    flipped = _permutation(by_question)
    if differences_SQ.shape[0] == 1:
        return flipped, "sign-flip permutation over questions"
    spread_of_mean, mean = spread(differences_SQ), abs(float(differences_SQ.mean()))
    t = (
        float(2 * stats.t.sf(mean / math.sqrt(spread_of_mean.variance), spread_of_mean.freedom))
        if spread_of_mean.variance > 0
        else 0.0
    )
    # The larger, so the more cautious: t leans on normality, the permutation sees questions alone and no seeds.
    return max(t, flipped), "t over seeds and questions"


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values after Holm (1979), in their order."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    # The smallest of m is multiplied by m, the next by m - 1, ...; the running maximum keeps the order of the p-values.
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def detectable(differences_SQ: Table) -> float:
    """The smallest difference seen with 80% power at 5%: (t_0.975 + t_0.8) * sqrt(Var).

    Of right and wrong never below 6 / Q: five questions that all fall one way still have p = 0.06.
    """
    from scipy import stats

    spread_of_mean = spread(differences_SQ)
    # A true difference of this size lies t_0.975 standard errors from 0 on its own account, and t_0.8 more so that four
    # out of five draws around it are beyond the critical value.
    factor = float(stats.t.ppf(1 - LEVEL / 2, spread_of_mean.freedom) + stats.t.ppf(POWER, spread_of_mean.freedom))
    floor = 6 / differences_SQ.shape[1] if is_share(abs(differences_SQ)) else 0.0
    return max(floor, factor * math.sqrt(spread_of_mean.variance))


def _tested(first: str, second: str, differences_SQ: Table) -> PairedTest:
    p, test = paired_p(differences_SQ)
    return PairedTest(first, second, float(differences_SQ.mean()), p, p, detectable(differences_SQ), test)


def _share_interval(mean: float, spread_of_mean: MeanVariance, questions: int) -> tuple[float, float]:
    from scipy import stats

    size = float(questions)
    if spread_of_mean.variance > 0 and 0 < mean < 1:
        # Fewer degrees of freedom than questions widen the interval as they widen t.
        wider = stats.t.ppf(1 - LEVEL / 2, spread_of_mean.freedom) / stats.t.ppf(1 - LEVEL / 2, questions - 1)
        # The effective number of questions: p (1 - p) / n is the variance of a share of n, solved for n.
        size = mean * (1 - mean) / (spread_of_mean.variance * float(wider) ** 2)
    right, wrong = mean * size, (1 - mean) * size
    # Clopper and Pearson (1934) by quantiles of the beta distribution, which take a number of trials that is not whole.
    low = float(stats.beta.ppf(LEVEL / 2, right, wrong + 1)) if right > 0 else 0.0
    high = float(stats.beta.ppf(1 - LEVEL / 2, right + 1, wrong)) if wrong > 0 else 1.0
    return low, high


def _permutation(by_question: Table) -> float:
    """P(|mean| as large | signs by chance): all of them where there are few, else drawn with a fixed seed."""
    import numpy as np

    moved = by_question[by_question != 0]
    if not moved.size:
        return 1.0
    # In floating point the same sum in another order may come out smaller by an ulp, and must count as equal.
    observed = abs(moved.sum()) * (1 - 1e-12)
    if moved.size <= 14:
        # 2^14 = 16,384 patterns of signs (P, Q): all of them cost less than the drawn ones, and give the exact p-value.
        signs = np.array(list(itertools.product((-1, 1), repeat=moved.size)))
        return float((abs(signs @ moved) >= observed).mean())
    signs = np.random.default_rng(0).choice(np.array((-1.0, 1.0)), size=(PERMUTATIONS, moved.size))
    # The observed signs are one of the draws, so that no p-value is 0.
    return float(((abs(signs @ moved) >= observed).sum() + 1) / (PERMUTATIONS + 1))
