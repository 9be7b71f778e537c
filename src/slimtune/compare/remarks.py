"""What a reader must know besides what the runs say: of the data, of the model, and of where it was run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from slimtune.compare import figures
from slimtune.compare.task import Task
from slimtune.data.reading import read_labelled

if TYPE_CHECKING:
    from slimtune.compare.facts import Facts

UNPROMPTED = (
    "The model as it comes has no arm: it writes no text, so it can't be prompted, and its head for the labels is "
    "drawn anew for each run and would answer by chance."
)
UNFORGOTTEN = "Forgetting has no measure here: a classifier predicts no next token, so it has no loss on other text."


def remarks(task: Task, writes_text: bool) -> list[str]:
    """Of a comparison on labels: what answering by no text at all would score, and what is left out and why."""
    if task.kind != "classification":
        return []
    return [_constant_answer(task), *([] if writes_text else [UNPROMPTED]), UNFORGOTTEN]


def _constant_answer(task: Task) -> str:
    label, _ = Counter(row.label for row in read_labelled(task.train)).most_common(1)[0]
    asked = [row.label for row in read_labelled(task.questions)]
    share = asked.count(label) / len(asked)
    return (
        f"Always answering '{label}', the most frequent label to learn from, would be right on {figures.score(share)} "
        "of the questions."
    )


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
