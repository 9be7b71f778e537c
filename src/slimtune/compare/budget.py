"""What was equal between the methods and what was not, told from what was measured."""

from __future__ import annotations

from collections.abc import Callable

from slimtune.compare import figures
from slimtune.compare.results import Training
from slimtune.compare.summary import Row, Summary

COUNTED: dict[str, Callable[[Training], float]] = {
    "steps": lambda training: training.steps,
    "examples a step": lambda training: training.batch,
    "tokens seen": lambda training: training.tokens,
}


def equal_and_not(summary: Summary) -> tuple[list[str], list[str]]:
    """Two lists of sentences: what all arms shared, and where they differed."""
    questions = next((row.score.questions for row in summary.scored if row.score), 0)
    same = [f"The same {questions} questions for every arm and seed, judged by {summary.scorer}."]
    different: list[str] = []
    trained = [row for row in summary.rows if row.arm.is_trained and row.done]
    if trained:
        same.append("The same training examples for every method, in the same order for the same seed.")
        for name, figure in COUNTED.items():
            _sort(name, figure, trained, same, different)
        _rates(trained, same, different)
    if any(not row.arm.is_trained and row.arm.shots for row in summary.rows):
        different.append("Prompts with examples see only those; they were drawn anew from the training data by seed.")
    if summary.base is not None:
        different.append("The model as it comes answers the same each time and was asked once: its interval is over "
                         "questions alone.")  # fmt: skip
    return same, different


def _sort(
    name: str, figure: Callable[[Training], float], trained: list[Row], same: list[str], different: list[str]
) -> None:
    by_arm = {row.name: row.of_training(figure) for row in trained}
    if len(set(by_arm.values())) == 1:
        same.append(f"{name.capitalize()}: {figures.count(next(iter(by_arm.values())))} for every method.")
    else:
        told = ", ".join(f"{arm} {figures.count(value)}" for arm, value in by_arm.items())
        different.append(f"{name.capitalize()}: {told}.")


def _rates(trained: list[Row], same: list[str], different: list[str]) -> None:
    rates = {row.name: row.of_training(lambda training: training.learning_rate) for row in trained}
    if len(set(rates.values())) == 1:
        same.append(f"Learning rate: {next(iter(rates.values())):g} for every method.")
    else:
        told = ", ".join(f"{arm} {rate:g}" for arm, rate in rates.items())
        different.append(f"Learning rate: {told}; none of them was searched for here.")
