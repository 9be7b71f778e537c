"""Known findings on results in which they show, don't, or can't be told."""

from __future__ import annotations

from typing import Any

import pytest

from compare.constructed import BASE, FOUR_SHOT, FULL, LORA, QLORA, RANDOM, done, summary
from slimtune.compare.findings import findings
from slimtune.recipe.candidates import trained

RANK_64, SCALED = trained("lora:r=64"), trained("lora:r=64:use_rslora=true")


def verdicts(*parts: tuple) -> dict[str, str]:
    return {finding.claim: finding.verdict for finding in findings(summary(parts))}


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [([0.9, 0.91, 0.9], "seen here"), ([0.5, 0.52, 0.51], "not seen here")],
)
def test_qlora_beside_lora(shares: list[float], verdict: str) -> None:
    found = verdicts((LORA, done(LORA, [0.9, 0.92, 0.91])), (QLORA, done(QLORA, shares)))
    assert found["LoRA on a base in 4 bits scores as on one in 16"] == verdict


@pytest.mark.parametrize(
    ("lora", "full", "verdict"),
    [
        ([0.5, 0.52, 0.51], [0.9, 0.91, 0.9], "seen here"),
        ([0.9, 0.91, 0.9], [0.5, 0.52, 0.51], "not seen here"),
        ([0.9, 0.91, 0.9], [0.9, 0.92, 0.91], "can't be told"),
    ],
)
def test_lora_beside_full_tuning(lora: list[float], full: list[float], verdict: str) -> None:
    found = verdicts((LORA, done(LORA, lora)), (FULL, done(FULL, full)))
    assert found["LoRA learns less than full tuning"] == verdict


@pytest.mark.parametrize(
    ("lora", "full", "verdict"), [(0.05, 0.3, "seen here"), (0.3, 0.05, "not seen here"), (None, 0.1, "can't be told")]
)
def test_forgetting(lora: float | None, full: float, verdict: str) -> None:
    found = verdicts((LORA, done(LORA, [0.9] * 3, rise=lora)), (FULL, done(FULL, [0.9] * 3, rise=full)))
    assert found["LoRA forgets less than full tuning"] == verdict


def of_seeds(candidate: Any, rises: list[float]) -> list[Any]:
    return [done(candidate, [0.9], rise=rise)[0].model_copy(update={"seed": seed}) for seed, rise in enumerate(rises)]


@pytest.mark.parametrize(
    ("lora", "full"),
    [([0.1, 0.1, 0.3], [0.2, 0.4, 0.4]), ([0.1], [0.4]), ([0.1, 0.1], [0.4, 0.4])],
    ids=["seeds that overlap", "one seed", "two seeds"],
)
def test_too_little_tells_nothing(lora: list[float], full: list[float]) -> None:
    found = verdicts((LORA, of_seeds(LORA, lora)), (FULL, of_seeds(FULL, full)))
    assert found["LoRA forgets less than full tuning"] == "can't be told"


def test_intruders_of_lora_full_tuning_and_rslora() -> None:
    found = verdicts(
        (LORA, done(LORA, [0.9] * 3, intruders=150)),
        (FULL, done(FULL, [0.9] * 3, intruders=10)),
        (RANK_64, done(RANK_64, [0.9] * 3, intruders=90)),
        (SCALED, done(SCALED, [0.9] * 3, intruders=120)),
    )
    assert found["Full tuning has fewer intruder dimensions than LoRA"] == "seen here"
    assert found["rsLoRA has fewer intruder dimensions than LoRA of the same high rank"] == "not seen here"


def test_random_answers_that_cost_much_speak_against_the_format_alone() -> None:
    found = verdicts((FOUR_SHOT, done(FOUR_SHOT, [0.8, 0.82, 0.81])), (RANDOM, done(RANDOM, [0.1, 0.12, 0.1])))
    assert list(found.values()) == ["not seen here"]


def test_nothing_is_claimed_of_arms_that_are_not_there() -> None:
    assert verdicts((BASE, done(BASE, [0.5])), (LORA, done(LORA, [0.6, 0.6, 0.6]))) == {}
