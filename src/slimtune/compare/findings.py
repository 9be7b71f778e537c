"""Findings of the literature held against the runs: seen here, not seen here, or why these runs can't tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from slimtune.compare import format as figures
from slimtune.compare.choice import ENOUGH_SEEDS
from slimtune.compare.summary import CandidateRow, Summary
from slimtune.metrics.seeds import PairedTest

Verdict = Literal["seen here", "not seen here", "can't be told"]


@dataclass(frozen=True)
class Finding:
    """A claim, where it comes from, and what these runs say to it."""

    claim: str
    source: str
    verdict: Verdict
    evidence: str


def findings(summary: Summary) -> list[Finding]:
    """Every known finding for which the candidates are there."""
    made = [rule(summary) for rule in RULES]
    return [finding for finding in made if finding is not None]


def _qlora(summary: Summary) -> Finding | None:
    def judge(lora: CandidateRow, qlora: CandidateRow, pair: PairedTest) -> tuple[Verdict, str]:
        assert lora.score
        low, high = lora.score.low, lora.score.high
        inside = low <= qlora.mean <= high
        return (
            "not seen here" if pair.is_shown else "seen here" if inside else "can't be told",
            f"qlora {figures.score(qlora.mean)} is {'inside' if inside else 'outside'} of lora's interval "
            f"({figures.score(low)} to {figures.score(high)})",
        )

    claim, source = "LoRA on a base in 4 bits scores as on one in 16", "Dettmers et al. 2023"
    return _tested(summary, claim, source, (summary.row("lora"), summary.row("qlora")), judge)


def _lora_against_full(summary: Summary) -> Finding | None:
    def judge(lora: CandidateRow, full: CandidateRow, pair: PairedTest) -> tuple[Verdict, str]:
        worse = summary.sign * (full.mean - lora.mean) > 0
        return (
            ("seen here" if worse else "not seen here") if pair.is_shown else "can't be told",
            f"lora {figures.score(lora.mean)} after {_steps(lora)}, full {figures.score(full.mean)} after "
            f"{_steps(full)}",
        )

    claim, source = "LoRA learns less than full tuning", "Biderman et al. 2024"
    return _tested(summary, claim, source, (summary.row("lora"), summary.row("full")), judge)


def _forgetting(summary: Summary) -> Finding | None:
    lora, full = summary.row("lora"), summary.row("full")
    return _lower(
        "LoRA forgets less than full tuning", "Biderman et al. 2024", lora, full, lambda row: row.forgotten,
        lambda value: f"{figures.change(value)} nats per token on other text",
    )  # fmt: skip


def _intruders(summary: Summary) -> Finding | None:
    lora, full = summary.row("lora"), summary.row("full")
    return _lower(
        "Full tuning has fewer intruder dimensions than LoRA", "Shuttleworth et al. 2024", full, lora,
        lambda row: row.intruders, lambda value: f"{figures.ratio(value)} a matrix",
    )  # fmt: skip


def _rslora(summary: Summary) -> Finding | None:
    """The pair of candidates that differ in `use_rslora` alone, at the highest rank."""
    pairs = []
    for row in summary.scored:
        fields = dict(row.candidate.fields)
        if row.candidate.method == "lora" and fields.pop("use_rslora", "false").lower() == "true":
            twins = [r for r in summary.scored if r.candidate.method == "lora" and dict(r.candidate.fields) == fields]
            pairs += [
                (int(fields.get("r", 16)), row, twin)
                for twin in twins
                if twin.candidate.quantize == row.candidate.quantize
            ]
    _, scaled, plain = max(pairs, key=lambda pair: pair[0], default=(0, None, None))
    return _lower(
        "rsLoRA has fewer intruder dimensions than LoRA of the same high rank", "Shuttleworth et al. 2024",
        scaled, plain, lambda row: row.intruders, lambda value: f"{figures.ratio(value)} a matrix",
    )  # fmt: skip


def _random_labels(summary: Summary) -> Finding | None:
    def judge(twin: CandidateRow, control: CandidateRow, pair: PairedTest) -> tuple[Verdict, str]:
        lost = pair.is_shown and summary.sign * (twin.mean - control.mean) > 0
        return (
            "not seen here" if lost else "can't be told",
            f"{twin.name} {figures.score(twin.mean)}, with random answers {figures.score(control.mean)}",
        )

    claim = "Examples in the prompt help through their format; random answers serve nearly as well"
    return _tested(summary, claim, "Min et al. 2022", (summary.twin, summary.control), judge)


RULES: tuple[Callable[[Summary], Finding | None], ...] = (
    _qlora,
    _lora_against_full,
    _forgetting,
    _intruders,
    _rslora,
    _random_labels,
)


def _tested(
    summary: Summary,
    claim: str,
    source: str,
    rows: tuple[CandidateRow | None, CandidateRow | None],
    judge: Callable[[CandidateRow, CandidateRow, PairedTest], tuple[Verdict, str]],
) -> Finding | None:
    """A claim on the scores of two candidates, by their test."""
    first, second = rows
    if first is None or second is None:
        return None
    pair = summary.pair(first, second)
    if pair is None:
        return Finding(claim, source, "can't be told", "no seed was done with both")
    verdict, evidence = judge(first, second, pair)
    shown = "a difference is shown" if pair.is_shown else "no difference is shown"
    test_says = f"{shown} (adjusted p {figures.p_value(pair.adjusted)}; detectable {figures.score(pair.detectable)})"
    return Finding(claim, source, verdict, f"{evidence}; {test_says}")


def _lower(
    claim: str,
    source: str,
    low: CandidateRow | None,
    high: CandidateRow | None,
    figure: Callable[[CandidateRow], float | None],
    shown: Callable[[float], str],
) -> Finding | None:
    """A claim that one candidate's figure is below another's; these have no test, so all of enough seeds must agree."""
    if low is None or high is None:
        return None
    first, second = figure(low), figure(high)
    if first is None and second is None:
        return None
    if first is None or second is None:
        return Finding(claim, source, "can't be told", "it was not measured on both")
    values = [[value for r in row.done if (value := figure(_alone(row, r))) is not None] for row in (low, high)]
    ordered, reverse = max(values[0]) < min(values[1]), min(values[0]) >= max(values[1])
    runs = min(len(values[0]), len(values[1]))
    enough = runs >= ENOUGH_SEEDS
    verdict: Verdict = "can't be told" if not enough else "seen here" if ordered else "not seen here"
    verdict = verdict if ordered or reverse else "can't be told"
    apart = "the seeds are apart" if ordered or reverse else "the seeds overlap"
    seeds_say = apart if enough else f"{runs} seed{'s' if runs > 1 else ''} each, too few to tell"
    return Finding(claim, source, verdict, f"{low.name} {shown(first)}, {high.name} {shown(second)}; {seeds_say}")


def _alone(row: CandidateRow, result: object) -> CandidateRow:
    """A row of one run."""
    return CandidateRow(row.candidate, 1, (result,), (), row.score)  # type: ignore[arg-type]


def _steps(row: CandidateRow) -> str:
    steps = row.of_training(lambda training: training.steps)
    return f"{figures.count(steps)} steps"
