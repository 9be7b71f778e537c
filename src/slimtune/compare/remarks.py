"""What a reader must know besides what the runs say: of the data, of the model, and of where it was run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from slimtune.compare import figures
from slimtune.compare.facts import Constant, Facts
from slimtune.compare.summary import Summary
from slimtune.compare.task import Task
from slimtune.data.reading import read_labelled

UNPROMPTED = (
    "The model as it comes has no arm: it writes no text, so it can't be prompted, and its head for the labels is "
    "drawn anew for each run and would answer by chance."
)
UNFORGOTTEN = "Forgetting has no measure here: a classifier predicts no next token, so it has no loss on other text."


def remarks(task: Task, writes_text: bool, constant: Constant | None) -> list[str]:
    """Of a comparison on labels: what one answer to everything would score, and what is left out and why."""
    if constant is None:
        return []
    said = (
        f"Always answering '{constant.label}', the most frequent label to learn from, would be right on "
        f"{figures.score(constant.share)} of the questions."
    )
    return [said, *([] if writes_text else [UNPROMPTED]), UNFORGOTTEN]


def constant_of(task: Task) -> Constant | None:
    """What the most frequent label to learn from would score; None where there are no labels."""
    if task.kind != "classification":
        return None
    label, _ = Counter(row.label for row in read_labelled(task.train)).most_common(1)[0]
    asked = [row.label for row in read_labelled(task.questions)]
    return Constant(label=label, share=asked.count(label) / len(asked))


def beside_constant(summary: Summary, constant: Constant | None) -> list[str]:
    """A warning, where not even the best is shown to know more than the most frequent label."""
    best = summary.scored[0] if summary.scored else None
    if constant is None or best is None or best.score is None or best.score.low > constant.share:
        return []
    return [
        f"Nothing is shown to have been learned: the interval of {best.name}, the best here, does not lie above what "
        f"always answering '{constant.label}' would score ({figures.score(constant.share)})."
    ]


def moved(before: Facts, machine: Mapping[str, str], versions: Mapping[str, str]) -> list[str]:
    """What runs that are there were made with, where that is something else than now."""
    changed = {name: value for name, value in before.machine.items() if machine.get(name) != value}
    older = {name: value for name, value in before.versions.items() if versions.get(name) != value}
    if not changed and not older:
        return before.moved
    told = figures.names([f"{name} {value}" for name, value in (changed | older).items()])
    said = f"Until {before.date} it was run with {told}: " + (
        "memory and time of those runs do not compare with the others." if changed else "look whether that matters."
    )
    return [*before.moved, said]
