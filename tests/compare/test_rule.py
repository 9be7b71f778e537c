"""The rule of what is chosen, held over many made-up comparisons: what a person would object to never comes out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import pytest

from compare.constructed import done, training
from slimtune.compare.choice import ALIKE, AS_GOOD, choose, gives_up, is_cheaper
from slimtune.compare.summary import CandidateRow, Summary
from slimtune.metrics.seeds import MeanInterval, PairedTest
from slimtune.recipe.candidates import Candidate, prompted, trained

METHODS = ("full", "lora", "qlora", "dora", "ia3")


def row(
    candidate: Candidate, score: float, memory: float = 1.0, seconds: float = 60.0, disk: float = 20.0
) -> CandidateRow:
    runs = tuple(done(candidate, [0.5], training(memory, seconds, disk)))
    return CandidateRow(candidate, 1, runs, (), MeanInterval(score, score - 0.05, score + 0.05, 3, 100))


def compared(rows: list[CandidateRow], shown: float, higher: bool = True) -> Summary:
    """A difference of `shown` or more is a shown one."""
    pairs = [
        PairedTest(
            a.name, b.name, a.mean - b.mean, p := (0.01 if abs(a.mean - b.mean) >= shown else 0.6), p, shown, "t"
        )
        for a, b in combinations(rows, 2)
    ]
    return Summary(tuple(rows), tuple(pairs), "exact match", higher)


def many(count: int = 400) -> Iterator[Summary]:
    draw = random.Random(0)
    for _ in range(count):
        kinds = [prompted(0), prompted(4), *map(trained, METHODS)]
        middle = draw.uniform(0.1, 0.9)
        rows = [
            row(kind, middle + draw.choice([0.003, 0.03, 0.3]) * draw.uniform(-0.3, 0.3), draw.uniform(1, 1.5),
                draw.uniform(60, 90), draw.choice([20, 21, 40]))
            for kind in draw.sample(kinds, draw.randint(2, len(kinds)))
        ]  # fmt: skip
        yield compared(rows, draw.choice([0.01, 0.05, 0.1]), draw.random() < 0.7)


SUMMARIES = list(many())


def chosen_of(summary: Summary) -> CandidateRow:
    return next(row for row in summary.rows if row.name == choose(summary).candidate)


def test_what_is_shown_to_be_worse_is_never_chosen() -> None:
    for summary in SUMMARIES:
        assert summary.beaten_by(chosen_of(summary)) is None


def test_what_is_given_up_for_less_cost_is_never_more_than_two_in_a_hundred() -> None:
    gaps = [gives_up(chosen_of(summary), summary.scored[0]) for summary in SUMMARIES]
    assert 0 < max(gaps) <= AS_GOOD
    assert 0.2 < sum(gap > 0 for gap in gaps) / len(gaps) < 0.8


def test_a_lower_score_is_chosen_only_for_a_cost_that_differs_by_a_tenth_and_against_none_that_does() -> None:
    for summary in SUMMARIES:
        chosen, best = chosen_of(summary), summary.scored[0]
        if chosen is best or not chosen.candidate.is_trained:
            continue
        ratios = [one / other for one, other in [
            (chosen.peak_bytes, best.peak_bytes), (chosen.train_seconds, best.train_seconds),
            (chosen.size_bytes, best.size_bytes),
        ] if one and other]  # fmt: skip
        assert min(ratios) < 1 - ALIKE
        assert max(ratios) <= 1 + ALIKE


def test_what_is_better_in_everything_is_chosen() -> None:
    for summary in SUMMARIES:
        rows = [row for row in summary.rows if row.candidate.is_trained]
        if not rows:
            continue
        ahead = max if summary.higher_is_better else min
        top = ahead(each.mean for each in summary.rows)
        better = row(trained("lora:r=3"), top + summary.sign * 1e-6, 0.5, 30, 10)
        assert choose(compared([better, *rows], 0.05, summary.higher_is_better)).candidate == better.name


def test_the_order_of_the_rows_changes_nothing() -> None:
    for summary in SUMMARIES:
        assert choose(replace(summary, rows=summary.rows[::-1])).candidate == choose(summary).candidate


def test_what_is_chosen_stays_chosen_when_it_becomes_cheaper() -> None:
    for summary in SUMMARIES:
        chosen = chosen_of(summary)
        halves = [(cost or 0) / 2 for cost in (chosen.peak_bytes, chosen.train_seconds, chosen.size_bytes)]
        cheaper = row(chosen.candidate, chosen.mean, halves[0] / 1e9, halves[1], halves[2] / 1e6)
        rows = tuple(cheaper if each is chosen else each for each in summary.rows)
        assert choose(replace(summary, rows=rows)).candidate == chosen.name


def test_a_difference_that_is_not_shown_is_not_equality() -> None:
    full, qlora = row(trained("full"), 0.946, 4.11, 57), row(trained("qlora"), 0.887, 1.84, 39)
    summary = compared([full, qlora], shown=0.099)
    said = choose(summary)
    assert said.candidate == "full"
    assert said.headline == (
        "Choose full: it scores 0.059 better than qlora, which may be chance, but takes 2.2 times the memory to train"
    )
    assert "the score decides" in said.paragraph


def test_a_cost_that_differs_by_less_than_a_tenth_does_not_count_and_time_does() -> None:
    lora = row(trained("lora"), 0.90, 1.96, 36)
    assert not is_cheaper(row(trained("qlora"), 0.90, 1.84, 36), lora)
    assert not is_cheaper(row(trained("qlora"), 0.90, 1.20, 44), lora)
    assert is_cheaper(row(trained("qlora"), 0.90, 1.20, 38), lora)


@pytest.mark.parametrize(
    ("rows", "headline"),
    [
        (
            [row(trained("lora"), 0.9, 1.0), row(trained("full"), 0.91, 3.4)],
            "Choose lora: full scores 0.010 better, which may be chance, and takes 3.4 times the memory to train",
        ),
        (
            [row(prompted(4), 0.9), row(trained("lora"), 0.91)],
            "Choose 4-shot: lora scores 0.010 better, which may be chance, and has to be trained",
        ),
        (
            [row(prompted(0), 0.9), row(trained("lora"), 0.91)],
            "Keep the model as it comes: lora scores 0.010 better, which may be chance, and has to be trained",
        ),
        (
            [row(trained("lora"), 0.95), row(trained("dora"), 0.9)],
            "Choose lora: it scores best, 0.050 better than dora, which may be chance",
        ),
        (
            [row(prompted(0), 0.8), row(trained("lora"), 0.85)],
            "Choose lora: it scores 0.050 better than the model as it comes, which may be chance, but has to be "
            "trained",
        ),
    ],
)
def test_the_headline_names_the_trade(rows: list[CandidateRow], headline: str) -> None:
    assert choose(compared(rows, shown=0.1)).headline == headline
