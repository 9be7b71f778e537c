"""About how long a comparison takes, before it is paid for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slimtune.compare.runner import unfinished
from slimtune.compare.setup import ComparisonSetup, model_of, recipe_of
from slimtune.compare.stages import stages_of
from slimtune.errors import SlimtuneError
from slimtune.recipe.candidates import Candidate, Run

START_SECONDS, LOAD_SECONDS = 8.0, 1.0
"""Of each process for its libraries, and of each of its commands for the weights, on two cores."""
SPECTRA_SECONDS = 25.0
"""Of 210 matrices of 576 rows, on two cores."""
FORWARD_SHARE = 0.5
"""Of a step with a frozen base: two operations a weight forward, and two for the gradient of its input."""
ANSWER_TOKENS, ASKED_AT_ONCE = 40, 32
TEXTS_TOKENS = 12_000
"""Of all shipped sets together; they are read before and after."""


@dataclass(frozen=True)
class CandidateEstimate:
    """One candidate: its runs, those still to be done, and about how many seconds each takes, None if nobody knows."""

    candidate: Candidate
    runs: int
    todo: int
    seconds: float | None

    @property
    def seconds_left(self) -> float | None:
        """Of all that are still to be done."""
        return None if self.seconds is None else self.seconds * self.todo

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"candidate": self.candidate.name, "runs": self.runs, "todo": self.todo, "seconds": self.seconds}


@dataclass(frozen=True)
class Estimate:
    """All candidates, and where the figures come from."""

    lines: list[CandidateEstimate]
    why: str

    @property
    def seconds(self) -> float | None:
        """Of all that is still to be done."""
        left = [line.seconds_left for line in self.lines]
        # One unknown makes the sum unknown: a total that leaves something out reads like a total.
        return None if None in left else sum(value for value in left if value is not None)


@dataclass(frozen=True)
class Planned:
    """What the planner says of the steps: seconds by method and base, tokens in each, bytes of the weights."""

    steps: dict[tuple[str, str], float]
    tokens_a_step: float
    weight_bytes: float
    bandwidth: float

    @property
    def read_seconds(self) -> float:
        """Of one token, forward."""
        return FORWARD_SHARE * min(self.steps.values()) / self.tokens_a_step

    @property
    def write_seconds(self) -> float:
        """Of one token of each answer in a batch: all weights are read once."""
        return 2 * self.weight_bytes / self.bandwidth


def estimate(setup: ComparisonSetup, runs: Sequence[Run]) -> Estimate:
    """From the planner's simulated steps; coarse, for it knows the machine only if it was calibrated."""
    candidates, todo = setup.settings.candidates, unfinished(setup, runs)
    planned, why = _plan(setup, [candidate for candidate in candidates if candidate.is_trained])
    lines = []
    for candidate in candidates:
        own = [run for run in runs if run.candidate == candidate]
        mean = sum(_seconds(setup, run, planned) for run in own) / len(own) if planned else None
        lines.append(CandidateEstimate(candidate, len(own), sum(run in todo for run in own), mean))
    return Estimate(lines, why)


def _seconds(setup: ComparisonSetup, run: Any, planned: Planned) -> float:
    candidate = run.candidate
    questions = sum(1 for _ in setup.questions.open(encoding="utf-8"))
    # Of one example; questions come from the same file and are taken to be as long.
    tokens = planned.tokens_a_step / _batch(setup, run)
    seconds = START_SECONDS
    for stage in stages_of(setup, run):
        # Each stage reads the weights again, whatever the one before it had in memory.
        seconds += LOAD_SECONDS
        if stage.name == "train":
            known = planned.steps.get((candidate.method or "", _base(setup, candidate)))
            # Of a method and base that the planner left out, the slowest step of the others is the safer guess.
            seconds += _steps(setup, run) * (known or max(planned.steps.values()))
        elif stage.name == "evaluate" and setup.kind == "classification" and candidate.is_trained:
            seconds += questions * tokens * planned.read_seconds
        elif stage.name == "evaluate":
            # What all prompts begin with is read once, so that examples cost little more than a longer cache.
            seconds += questions * (tokens * 2) * planned.read_seconds + candidate.shots * tokens * planned.read_seconds
            seconds += math.ceil(questions / ASKED_AT_ONCE) * ANSWER_TOKENS * planned.write_seconds
        elif stage.name == "forgetting":
            share = 1.0 if setup.settings.texts is None else min(1.0, setup.settings.texts / 20)
            # Twice: the base and the tuned model read the same texts.
            seconds += 2 * share * TEXTS_TOKENS * planned.read_seconds
        else:
            seconds += SPECTRA_SECONDS
    return seconds


def _training(setup: ComparisonSetup, run: Any) -> dict[str, Any]:
    return recipe_of(setup, run)["training"]


def _batch(setup: ComparisonSetup, run: Any) -> int:
    settings = _training(setup, run) if run.candidate.is_trained else setup.recipe.get("training") or {}
    return settings.get("batch_size", 8) * settings.get("gradient_accumulation", 1)


def _steps(setup: ComparisonSetup, run: Any) -> int:
    settings = _training(setup, run)
    rows = sum(1 for _ in setup.train.open(encoding="utf-8"))
    return settings.get("max_steps") or math.ceil(rows / _batch(setup, run) * settings.get("epochs", 3.0))


def _plan(setup: ComparisonSetup, candidates: Sequence[Candidate]) -> tuple[Planned | None, str]:
    """What the planner says, and where it knows it from."""
    from slimtune.plan.plan import plan
    from slimtune.recipe.recipe import Recipe

    recipe = Recipe.of(setup.recipe)
    training = recipe.training
    try:
        report = plan(
            recipe.model.source, setup.train,
            # Without a trained candidate the planner still says how fast this machine reads the weights.
            methods=sorted({candidate.method or "" for candidate in candidates}) or ["lora"],
            bases=sorted({_base(setup, candidate) for candidate in candidates}) or None, batch_size=training.batch_size,
            gradient_accumulation=training.gradient_accumulation,
            gradient_checkpointing=training.gradient_checkpointing, epochs=1,
            dtype=recipe.model.dtype, max_length=(setup.recipe.get("data") or {}).get("max_length"),
            trust_remote_code=recipe.model.trust_remote_code,
        )  # fmt: skip
    except SlimtuneError as error:
        return None, f"how long it takes could not be planned: {error}"
    first, rates = report.choices[0], report.rates
    planned = Planned(
        steps={(choice.method, choice.base): choice.duration.step_seconds for choice in report.choices},
        tokens_a_step=first.duration.tokens / first.duration.steps,
        weight_bytes=first.parts.weights,
        bandwidth=rates.bandwidth,
    )
    how = "measured before" if rates.is_measured else "a guess, which slimtune plan --calibrate replaces"
    return planned, f"the steps were simulated; the speed of this machine is {how}"


def _base(setup: ComparisonSetup, candidate: Candidate) -> Any:
    """As what the weights are held that the candidate's method stands on."""
    return model_of(setup, candidate).get("quantize") or "dense"
