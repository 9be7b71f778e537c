"""Results of comparisons that were never run: made from a share of right answers and what it is to cost."""

from __future__ import annotations

import random
from collections.abc import Sequence

from slimtune.compare.results import DomainLosses, Result, RunScore, RunSpectrum, ShownQuestion, Training
from slimtune.compare.summary import Summary, summarize
from slimtune.recipe.candidates import Candidate, Run, prompted, trained

QUESTIONS = 100


def score(share: float, seed: int = 0, noise: int = 7, questions: int = QUESTIONS) -> RunScore:
    """Exactly this share is right: the same easy questions for all, and which of the middling ones by the noise."""
    right = round(share * questions)
    jitter = random.Random(f"{noise}-{seed}")
    ranks = sorted(range(questions), key=lambda question: question + jitter.uniform(0, 15))
    correct = set(ranks[:right])
    values = [float(question in correct) for question in range(questions)]
    return RunScore(
        name="exact match",
        per_question=values,
        answers=[f"answer {question}" if value else "wrong" for question, value in enumerate(values)],
        seconds=questions * 0.1,
    )


def training(peak_gb: float = 1.5, seconds: float = 60.0, size_mb: float = 20.0, rate: float = 1e-4) -> Training:
    return Training(
        steps=40,
        batch=16,
        tokens=47_000,
        seconds=seconds,
        peak_bytes=int(peak_gb * 1e9),
        trainable_parameters=4_884_480,
        size_bytes=int(size_mb * 1e6),
        learning_rate=rate,
        final_loss=0.05,
    )


def done(
    candidate: Candidate,
    shares: Sequence[float],
    costs: Training | None = None,
    rise: float | None = None,
    intruders: int | None = None,
    questions: int = QUESTIONS,
) -> list[Result]:
    """A run of the arm for each share."""
    noise = sum(map(ord, candidate.name))
    return [
        Result(
            candidate=candidate.name,
            seed=seed,
            status="done",
            score=score(share, seed, noise, questions),
            training=(costs or training()) if candidate.is_trained else None,
            forgetting=None
            if rise is None
            else [
                DomainLosses(name="encyclopedia", before=3.0, after=3.0 + rise + 0.01),
                DomainLosses(name="code", before=1.5, after=1.5 + rise - 0.01),
            ],
            spectrum=None if intruders is None else RunSpectrum(intruders=intruders, matrices=210, effective_rank=9.5),
        )
        for seed, share in enumerate(shares)
    ]


def failed(candidate: Candidate, seed: int, reason: str = "the device has not enough memory") -> Result:
    return Result(candidate=candidate.name, seed=seed, status="failed", reason=reason)


def summary(parts: Sequence[tuple[Candidate, Sequence[Result]]], seeds: int = 3) -> Summary:
    return summarize(
        [candidate for candidate, _ in parts], [result for _, results in parts for result in results], seeds
    )


BASE, ONE_SHOT, FOUR_SHOT = prompted(0), prompted(1), prompted(4)
RANDOM = prompted(4, random_labels=True)
FULL, LORA, QLORA, DORA = (trained(name) for name in ("full", "lora", "qlora", "dora"))


def everything() -> tuple[list[Candidate], list[Result]]:
    """A comparison in which much happened: a tie of methods, forgetting, a failed run, answers that hold HTML."""
    candidates = [BASE, ONE_SHOT, FOUR_SHOT, RANDOM, FULL, LORA, QLORA, DORA]
    results = [
        *done(BASE, [0.0]),
        *done(ONE_SHOT, [0.06, 0.11, 0.08]),
        *done(FOUR_SHOT, [0.31, 0.36, 0.28]),
        *done(RANDOM, [0.02, 0.05, 0.03]),
        *done(FULL, [0.95, 0.97, 0.94], training(3.4, 110, 269, 2e-5), 0.21, 14),
        *done(LORA, [0.96, 0.95, 0.97], training(1.65, 70, 19.5), 0.07, 160),
        *done(QLORA, [0.92, 0.95, 0.93], training(1.2, 95, 19.5), 0.09, 171),
        *done(DORA, [0.96, 0.96], training(1.8, 88, 20.1), 0.07, 150),
        failed(DORA, 2, "the loss is not a number in step 17; lower the learning rate"),
    ]
    return candidates, results


def questions(count: int = QUESTIONS) -> list[ShownQuestion]:
    return [ShownQuestion(text=f"question {number}", answer=f"answer {number}") for number in range(count)]


def run(candidate: Candidate, seed: int = 0) -> Run:
    return Run(candidate, seed)
