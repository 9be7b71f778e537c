"""What every task shares: the rows of an epoch, and the encoded dataset that a model is trained on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from slimtune.data.batches import Encoded, Objective, pieces
from slimtune.data.reading import Splits, drawn, exact_shares, names_of
from slimtune.data.settings import DataSettings
from slimtune.errors import ConfigError, DataError, counted, listing

SAMPLED_TOKENS = 400
SKIPPED_SHOWN = 3
HELD_OUT = "held-out "
"""Before what examples are called, where they aren't those that are learned."""


@dataclass(frozen=True)
class Remark:
    """A sentence about the data for the user.

    Attributes:
        text: the sentence, or the rest of it behind `warning`.
        warning: its beginning, where something was lost, such as "3 texts dropped".
    """

    text: str
    warning: str = ""


@dataclass(frozen=True)
class Sample:
    """The beginning of an example as text.

    Attributes:
        pieces: the text in order, each piece with whether it is learned.
    """

    pieces: list[tuple[bool, str]]


Report = list[Remark | Sample]
"""Remarks and samples of a dataset, in the order in which they are shown."""


def sample_of(example: Encoded, tokenizer: Any) -> Sample:
    """Decode the first tokens of an example, split by whether they are learned."""
    # Cut before it is decoded: a packed row or a book has a hundred thousand tokens, of which a screen shows the first.
    shortened = Encoded(example.input_ids[:SAMPLED_TOKENS], example.labels[:SAMPLED_TOKENS])
    decoded = [(learned, tokenizer.decode(ids)) for learned, ids in pieces(shortened)]
    return Sample(decoded + [(False, " ...")] * (len(example.input_ids) > SAMPLED_TOKENS))


def splits_report(splits: Splits) -> list[Remark]:
    """What to know about rows before they are learned: ignored columns, repeated rows, held-out rows in training."""
    report: list[Remark] = []
    for source in (*splits.train, *splits.held_out):
        report += skipped_note(source.name, source.skipped)
    for source in splits.train:
        report += [Remark(note) for note in source.notes]
        if ignored := source.ignored:
            counts = {
                name: f" ({count:,} {'row' if count == 1 else 'rows'})" for name, count in ignored.items() if count
            }
            columns = listing(name + counts.get(name, "") for name in ignored)
            report.append(Remark(f"{source.name}: format {source.format} ignores the columns {columns}"))
    if repeated := splits.repeated:
        total = sum(len(source.rows) for source in splits.train)
        report.append(Remark(f" of {total:,}, which are learned again", f"repeated rows: {repeated:,}"))
    if leaked := splits.held_out_in_train:
        total = sum(len(source.rows) for source in splits.held_out)
        rest = f" of {total:,}, whose loss tells nothing of new rows; remove them"
        report.append(Remark(rest, f"held-out rows that are in the training data, too: {leaked:,}"))
    return report


def skipped_note(source: str, errors: Sequence[str]) -> list[Remark]:
    """How many rows of a source were left out because they can't be read, with why the first were; empty for none."""
    if not errors:
        return []
    shown = "".join(f"\n  {error}" for error in errors[:SKIPPED_SHOWN])
    return [Remark(f" of {source}, which can't be read; the first:{shown}", f"{counted(len(errors), 'row')} skipped")]


def lost(unit: str, limit: int, dropped: int, cut: int) -> Report:
    """How many examples were dropped or cut because they are longer than `limit` tokens; nothing where none was."""
    report: Report = []
    if dropped:
        report.append(Remark(f": longer than {limit:,} tokens", f"{counted(dropped, unit)} dropped"))
    if cut:
        report.append(Remark(f" at {limit:,} tokens", f"{counted(cut, unit)} cut"))
    return report


def held_out_note(count: int, what: str) -> str:
    """The end of a sentence that counts the held-out examples, if there are any."""
    return f"; {count:,} {what if count != 1 else what.replace('s ', ' ')}held out" if count else ""


@dataclass(frozen=True)
class EncodedDataset:
    """What a model is trained on and evaluated by.

    Attributes:
        facts: what a model card says of the data.
        report: counts, losses and samples, to be shown by the caller.
        objective: how examples are batched and what is minimised; the model's own loss by default.
        judge: scores of a model on the held-out examples.
        after: facts that are known only once training is over.
    """

    examples: Any
    held_out: Sequence[Any]
    facts: dict[str, Any]
    report: Report
    objective: Objective | None = None
    judge: Callable[[Any], dict[str, float]] = lambda model: {}
    after: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class TaskData:
    """The rows of one epoch of all sources, and those held out.

    The data of a task is a subclass with a method `encode(model, tokenizer)` that returns an `EncodedDataset`, and
    `of` where rows need a check of their own.

    Attributes:
        names: of the labels or tags that a model's head gives, if the task has some.
        task_type: as PEFT configs name it.
        model_task: as `slimtune.models.load.load_model` names the model that learns from these rows.
    """

    splits: Splits
    settings: DataSettings
    rows: list[Any]
    held_out: list[Any]
    names: list[str] | None = None

    task_type: ClassVar[str]
    model_task: ClassVar[Any]
    supports: ClassVar[tuple[str, ...]] = ()
    """Which of the settings for models that write text it takes."""

    @classmethod
    def of(cls, splits: Splits, settings: DataSettings, seed: int = 0) -> Self:
        """The rows of one epoch of all sources; raises ConfigError for settings that the task doesn't take."""
        for name in ("packing", "streaming", "chat_template"):
            # Refused and not dropped: a recipe with packing for a classifier was written with something else in mind.
            if getattr(settings, name) and name not in cls.supports:
                raise ConfigError(f"{name} is for models that write text, and not for task {splits.task}; leave it out")
        if settings.too_long == "split":
            raise ConfigError(
                f"too_long: split is for texts to go on with, and not for task {splits.task}; drop or truncate"
            )
        # Source by source with one seed: adding a source leaves the draw from the others as it was.
        shares = zip(splits.train, exact_shares(splits.train), strict=True)
        rows = [row for source, count in shares for row in drawn(source.rows, count, seed)]
        return cls(splits, settings, rows, [row for source in splits.held_out for row in source.rows])

    @property
    def task(self) -> str:
        """The task, as a recipe names it."""
        return self.splits.task

    def facts(self, examples: int, held_out: int, tokens: int, limit: int, **more: Any) -> dict[str, Any]:
        """What a model card says of the data."""
        counts = {"source": names_of(self.splits.train), "examples": examples, "held out": held_out}
        return counts | {"tokens": f"{tokens:,}"} | more | {"maximum length": limit}


def refuse_unlearned(splits: Splits, what: str, learned: Collection[str], held_out: Iterable[str]) -> None:
    """Raises: DataError, where held-out rows have labels (or tags: `what`) that no row to train on has."""
    unknown = set(held_out) - set(learned)
    if unknown:
        there, here = names_of(splits.held_out), names_of(splits.train)
        raise DataError(f"{there} has {what} that {here} hasn't: {listing(unknown)}; correct them")
