"""Sources read into rows of one format each: the rows to train on, those held out, and what to know about them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from slimtune.data.chat_template import Message
from slimtune.data.columns import Layout, other_names, recognize
from slimtune.data.formats import find_format, formats_of, read_as
from slimtune.data.rows import Labelled, Unlabelled, Words, checked
from slimtune.data.settings import DataSettings, Source
from slimtune.data.sources import name_of, records, refuse, renamed, unusual_delimiters
from slimtune.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class SourceRows:
    """Rows of one source.

    Attributes:
        name: of the source, for messages.
        format: the name of the format of its rows.
        places: where each row stands, for error messages.
        weight: the share of an epoch that is drawn from here; None takes all rows.
        columns: the columns, each with the number of rows that have it; 0 where only the first row was read.
        fields: names of the format's columns, and what they are called in the source, where that was recognized.
        skipped: why each row that couldn't be read was left out.
        notes: how the source is read, where that isn't as its name says.
    """

    name: str
    format: str
    rows: Sequence[Any]
    places: Sequence[str] = ()
    weight: float | None = None
    columns: Mapping[str, int] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    skipped: Sequence[str] = ()
    notes: Sequence[str] = ()

    def at(self, indices: Sequence[int]) -> SourceRows:
        """The rows with these indices, in this order."""
        return replace(self, rows=[self.rows[i] for i in indices], places=[self.places[i] for i in indices])

    @property
    def ignored(self) -> dict[str, int]:
        """The columns that aren't read, each with its number of rows."""
        known = find_format(self.format)
        return {name: count for name, count in self.columns.items() if not known.uses(name)}


@dataclass(frozen=True)
class Splits:
    """The rows to train on and those held out, by source, and the task that they are for."""

    task: str
    train: list[SourceRows]
    held_out: list[SourceRows] = field(default_factory=list)

    @property
    def repeated(self) -> int:
        """How many rows to train on equal an earlier one."""
        rows = [_key(row) for source in self.train for row in source.rows]
        return len(rows) - len(set(rows))

    @property
    def held_out_in_train(self) -> int:
        """How many held-out rows also stand among the rows to train on."""
        held_out = [_key(row) for source in self.held_out for row in source.rows]
        learned = {_key(row) for source in self.train for row in source.rows} if held_out else set()
        return sum(row in learned for row in held_out)


def _key(row: Any) -> Any:
    return row.model_dump_json() if hasattr(row, "model_dump_json") else row


def read_splits(settings: DataSettings, task: str = "auto", seed: int = 0, most: int | None = None) -> Splits:
    """Read all rows for a task, and hold out a share of each source; raises DataError, ConfigError.

    Args:
        most: rows that are read of each source to train on; None for all.
    """
    formats_of(task)
    train = [_read(source, settings, task, most=most) for source in settings.train]
    task = _task(train, task)
    if settings.held_out_sources:
        return Splits(task, train, [_read(source, settings, task) for source in settings.held_out_sources])
    if not settings.held_out_share:
        return Splits(task, train)
    # Source by source: a share of the whole could leave a small source out of either half.
    halves = [_split(rows, settings.held_out_share, seed) for rows in train]
    return Splits(task, [rest for rest, _ in halves], [held_out for _, held_out in halves])


def peek_splits(settings: DataSettings, task: str = "auto") -> Splits:
    """Read the first row of each source, to find its format; raises DataError, ConfigError."""
    formats_of(task)
    train = [_read(source, settings, task, first=True) for source in settings.train]
    return Splits(_task(train, task), train)


def names_of(sources: Sequence[SourceRows]) -> str:
    """The names of sources, without their folders."""
    return ", ".join(Path(source.name).name for source in sources)


def _read(
    source: Source, settings: DataSettings, task: str, first: bool = False, most: int | None = None
) -> SourceRows:
    """The rows of a source, the `first` that can be read, or so many at `most`; raises DataError."""
    name = source.format if source.format != "auto" else settings.format
    layout = Layout(find_format(name, task)) if name != "auto" else None
    rows, places, skipped = [], [], []
    columns: Counter[str] = Counter()

    def bad(error: DataError) -> None:
        if settings.bad_rows == "error":
            refuse(error)
        skipped.append(str(error))

    for given, where in islice(records(source, first or most is not None, bad), most):
        try:
            # The first row that can be read decides; the others are read as it, or refused with what they lack.
            layout = layout or recognize(given, where, task)
            value = renamed(given, where, layout.fields)
            rows.append(read_as(layout.format, value, where))
        except DataError as error:
            bad(error)
            continue
        places.append(where)
        # A table has every column in every row, null where a row hasn't one.
        columns.update(column for column, content in value.items() if content is not None)
        if first:
            columns = Counter(dict.fromkeys(columns, 0))
            break
    if layout is None or not rows:
        raise DataError(f"none of the {len(skipped):,} rows of {name_of(source)} can be read: {skipped[0]}")
    name = name_of(source)
    notes = [
        f"{file} is separated by {what}" if file == name else f"{name}: {file} is separated by {what}"
        for file, what in unusual_delimiters(source).items()
    ]
    if layout.fields:
        pairs = ", ".join(f"{column}: {called}" for column, called in layout.fields.items())
        notes.append(f"{name}: read as {layout.format.name} with fields {{{pairs}}}")
    return SourceRows(
        name_of(source), layout.format.name, rows, places, source.weight, columns, layout.fields, skipped, notes
    )


def _task(sources: Sequence[SourceRows], task: str) -> str:
    """The given task, or the one that all sources are for; raises DataError if they differ."""
    if task != "auto":
        return task
    tasks = {find_format(source.format).task: source.name for source in sources}
    if len(tasks) > 1:
        kinds = "; ".join(f"{name} is data for task {kind}" for kind, name in sorted(tasks.items()))
        raise DataError(f"these sources can't be learned from together: {kinds}; train on one of them")
    return next(iter(tasks))


def _split(source: SourceRows, share: float, seed: int) -> tuple[SourceRows, SourceRows]:
    """The rows to train on, and a share of them drawn to be held out; raises DataError if either is empty."""
    order = list(range(len(source.rows)))
    # Shuffled before it is cut: files are often sorted by label or by date.
    random.Random(seed).shuffle(order)
    count = round(len(order) * share)
    if not 0 < count < len(order):
        less = "nothing is held out of" if not count else "nothing is left to learn from of"
        raise DataError(
            f"{less} the {len(order)} examples of {source.name} with a share of {share:g}; "
            f"{'raise' if not count else 'lower'} the share, or name a file of what is held out"
        )
    return source.at(order[count:]), source.at(order[:count])


def exact_shares(sources: Sequence[SourceRows], counts: Sequence[int] | None = None) -> list[int]:
    """How many examples an epoch takes of each source: all without weights, else by weight as many as there are in all.

    Numbers are rounded so that they add up, the largest remainders first.

    Args:
        counts: examples that each source has, if not as many as rows.
    """
    available = [len(source.rows) for source in sources] if counts is None else list(counts)
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return available
    exact = [sum(available) * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    # Largest remainder first, since floor minus exact is its negative; `sorted` is stable, so that ties go by place.
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for index in by_remainder[: sum(available) - sum(shares)]:
        shares[index] += 1
    return shares


def drawn(examples: Sequence[T], count: int, seed: int) -> list[T]:
    """Draw `count` examples: all of them, in their order, as often as they go into it, and the rest by seed."""
    times, rest = divmod(count, len(examples))
    # Without replacement: no example is seen three times before all are seen twice.
    return [*list(examples) * times, *random.Random(seed).sample(list(examples), rest)]


def read_rows(source: str | Path | Source, task: str = "text") -> list[Any]:
    """The rows of one source that a task can learn from; raises DataError with the line at fault."""
    return list(_read(Source.of(source), DataSettings(source), task).rows)


def read_labelled(source: str | Path | Source) -> list[Labelled]:
    """The texts with labels of one source; raises DataError with the line at fault."""
    return read_rows(source, "classification")


def read_texts(path: str | Path) -> list[Unlabelled]:
    """The texts to classify, with their labels where they have one; raises DataError with the line at fault."""
    rows = []
    for given, where in records(Source.of(path)):
        value = renamed(given, where, other_names(given, find_format("text-label"), ("label",)))
        rows.append(checked(Labelled if "label" in value else Unlabelled, value, where))
    return rows


def read_words(path: str | Path) -> list[Words]:
    """The texts to tag, as words, with their tags where they have some; raises DataError with the line at fault."""
    return list(_words(records(Source.of(path))))


def _words(values: Iterator[tuple[dict[str, Any], str]]) -> Iterator[Words]:
    for given, where in values:
        value = renamed(given, where, other_names(given, find_format("tokens-tags"), ("tags",)))
        if "tags" in value:
            yield read_as(find_format("tokens-tags"), value, where)
        elif "tokens" not in value and isinstance(value.get("text"), str):
            yield checked(Words, {"tokens": value["text"].split()}, where)
        else:
            yield checked(Words, value, where)


def read_questions(path: str | Path) -> list[list[Message]]:
    """The conversations to answer, without the answers that they may have; raises DataError."""
    return [row.turns() for row in read_rows(path, "grpo")]


def task_of(source: str | Path | Source) -> str:
    """What a model would learn from a source, by its first row; raises DataError."""
    value, where = next(records(Source.of(source)))
    return recognize(value, where).format.task
