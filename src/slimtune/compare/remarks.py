"""What a reader must know besides the scores: the score of one constant answer, what was equal, what has changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from slimtune.compare import format as figures
from slimtune.compare.record import ComparisonRecord, ConstantAnswer
from slimtune.compare.results import Training
from slimtune.compare.setup import ComparisonSetup
from slimtune.compare.summary import Summary
from slimtune.data.reading import read_labelled

NO_BASE = (
    "The model as it comes is no candidate: it writes no text, so it can't be prompted, and its head for the labels is "
    "drawn anew for each run and would answer by chance."
)
NO_FORGETTING = "Forgetting has no measure here: a classifier predicts no next token, so it has no loss on other text."


def remarks(setup: ComparisonSetup, writes_text: bool, constant: ConstantAnswer | None) -> list[str]:
    """Of a comparison on labels: what one answer to everything would score, and what is left out and why."""
    if constant is None:
        return []
    sentence = (
        f"Always answering '{constant.label}', the most frequent label to learn from, would be right on "
        f"{figures.score(constant.share)} of the questions."
    )
    return [sentence, *([] if writes_text else [NO_BASE]), NO_FORGETTING]


def constant_of(setup: ComparisonSetup) -> ConstantAnswer | None:
    """What the most frequent label to learn from would score; None where there are no labels."""
    if setup.kind != "classification":
        return None
    label, _ = Counter(row.label for row in read_labelled(setup.train)).most_common(1)[0]
    labels = [row.label for row in read_labelled(setup.questions)]
    return ConstantAnswer(label=label, share=labels.count(label) / len(labels))


def not_above_constant(summary: Summary, constant: ConstantAnswer | None) -> list[str]:
    """A warning, where not even the best candidate is shown to do better than the most frequent label."""
    best = summary.scored[0] if summary.scored else None
    if constant is None or best is None or best.score is None or best.score.low > constant.share:
        return []
    return [
        f"Nothing is shown to have been learned: the interval of {best.name}, the best here, does not lie above what "
        f"always answering '{constant.label}' would score ({figures.score(constant.share)})."
    ]


def environment_changes(before: ComparisonRecord, machine: Mapping[str, str], versions: Mapping[str, str]) -> list[str]:
    """The machine and versions of earlier runs, where they aren't those of now, in sentences."""
    changed = {name: value for name, value in before.machine.items() if machine.get(name) != value}
    older = {name: value for name, value in before.versions.items() if versions.get(name) != value}
    if not changed and not older:
        return before.moved
    former = figures.names([f"{name} {value}" for name, value in (changed | older).items()])
    effect = "memory and time of those runs do not compare with the others" if changed else "look whether that matters"
    return [*before.moved, f"Until {before.date} it was run with {former}: {effect}."]


def equal_and_different(summary: Summary) -> tuple[list[str], list[str]]:
    """Two lists of sentences: what all candidates shared, and where they differed."""
    questions = next((row.score.questions for row in summary.scored if row.score), 0)
    same = [f"The same {questions} questions for every candidate and seed, judged by {summary.scorer}."]
    different: list[str] = []
    trained = [row for row in summary.rows if row.candidate.is_trained and row.done]
    if trained:
        same.append("The same training examples for every method, in the same order for the same seed.")
    for name, (figure, shown, note) in FIGURES.items():
        values = {row.name: row.of_training(figure) for row in trained}
        if len(set(values.values())) == 1:
            same.append(f"{name}: {shown(next(iter(values.values())))} for every method.")
        elif values:
            listed = ", ".join(f"{candidate} {shown(value)}" for candidate, value in values.items())
            different.append(f"{name}: {listed}{note}.")
    if any(not row.candidate.is_trained and row.candidate.shots for row in summary.rows):
        different.append("Prompts with examples see only those; they were drawn anew from the training data by seed.")
    if summary.base is not None:
        different.append(
            "The model as it comes answers the same each time and was run once: its interval is over questions alone."
        )
    return same, different


FIGURES: dict[str, tuple[Callable[[Training], float], Callable[[float | None], str], str]] = {
    "Steps": (lambda training: training.steps, figures.count, ""),
    "Examples a step": (lambda training: training.batch, figures.count, ""),
    "Tokens seen": (lambda training: training.tokens, figures.count, ""),
    "Learning rate": (lambda training: training.learning_rate, "{:g}".format, "; none of them was searched for here"),
}
"""Of a training, how each is written, and what is added where the candidates differ in it."""
