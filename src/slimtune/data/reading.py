"""Sources read into rows of one format each, with a part of them held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from slimtune.data.chat_template import Message
from slimtune.data.formats import Format, find_format, format_of, formats_of, read_as
from slimtune.data.rows import Labelled, Unlabelled, Words, checked
from slimtune.data.settings import DataSettings, Source
from slimtune.data.sources import name_of, records
from slimtune.errors import DataError


@dataclass(frozen=True)
class Part:
    """Rows of one source.

    Attributes:
        name: of the source, for people.
        format: of its rows.
        rows: what there is of it.
        places: where each of the rows stands, for complaints.
        weight: the share of an epoch that is drawn from here, if not everything is taken.
    """

    name: str
    format: str
    rows: Sequence[Any]
    places: Sequence[str] = ()
    weight: float | None = None

    def taken(self, indices: Sequence[int]) -> Part:
        """Only these rows, in this order."""
        return replace(self, rows=[self.rows[i] for i in indices], places=[self.places[i] for i in indices])


@dataclass(frozen=True)
class Parts:
    """What is learned from and what is held out, by source, and the task that such rows are for."""

    task: str
    train: list[Part]
    held_out: list[Part] = field(default_factory=list)


def read_parts(settings: DataSettings, task: str = "auto", seed: int = 0) -> Parts:
    """All rows of a task, and of each source the share that is held out; raises DataError, ConfigError."""
    formats_of(task)
    found = [_part(source, settings.format, task) for source in settings.train]
    task = _task(found, task)
    parts = [part for part, _ in found]
    if settings.held_out_sources:
        return Parts(task, parts, [_part(source, settings.format, task)[0] for source in settings.held_out_sources])
    if not settings.held_out_share:
        return Parts(task, parts)
    halves = [_halves(part, settings.held_out_share, seed) for part in parts]
    return Parts(task, [rest for rest, _ in halves], [out for _, out in halves])


def peek_parts(settings: DataSettings, task: str = "auto") -> Parts:
    """The first row alone of each source, for its format; raises DataError, ConfigError."""
    formats_of(task)
    found = [_part(source, settings.format, task, first=True) for source in settings.train]
    return Parts(_task(found, task), [part for part, _ in found])


def sources_of(parts: Sequence[Part]) -> str:
    """The names of sources, without their folders."""
    return ", ".join(Path(part.name).name for part in parts)


def read_rows(path: str | Path, task: str = "text") -> list[Any]:
    """The rows of one source that a task can learn from; raises DataError with the line at fault."""
    return list(_part(Source.of(path), "auto", task)[0].rows)


def read_labelled(path: str | Path) -> list[Labelled]:
    """The texts with labels of one source; raises DataError with the line at fault."""
    return read_rows(path, "classification")


def read_texts(path: str | Path) -> list[Unlabelled]:
    """The texts to judge, with their labels where they have one; raises DataError with the line at fault."""
    found = records(Source.of(path))
    return [checked(Labelled if "label" in value else Unlabelled, value, where) for value, where in found]


def read_words(path: str | Path) -> list[Words]:
    """The texts to tag, as words, with their tags where they have some; raises DataError with the line at fault."""
    return [_words(value, where) for value, where in records(Source.of(path))]


def _words(value: dict[str, Any], where: str) -> Words:
    if "tags" in value:
        return read_as(find_format("tokens-tags"), value, where)
    if "tokens" not in value and isinstance(value.get("text"), str):
        return checked(Words, {"tokens": value["text"].split()}, where)
    return checked(Words, value, where)


def read_questions(path: str | Path) -> list[list[Message]]:
    """The conversations to answer, without the answers that they may have; raises DataError."""
    return [row.turns() for row in read_rows(path, "grpo")]


def task_of(path: str | Path) -> str:
    """What a model would learn from a source, by its first row; raises DataError."""
    value, where = next(records(Source.of(path)))
    return format_of(value, where).task


def _task(found: Sequence[tuple[Part, Format]], task: str) -> str:
    """The task that was asked for, or the one that all sources are for; raises DataError if they differ."""
    if task != "auto":
        return task
    tasks = {known.task: part.name for part, known in found}
    if len(tasks) > 1:
        kinds = "; ".join(f"{name} is data for task {kind}" for kind, name in sorted(tasks.items()))
        raise DataError(f"these sources can't be learned from together: {kinds}; train on one of them")
    return next(iter(tasks))


def _part(source: Source, fallback: str, task: str, first: bool = False) -> tuple[Part, Format]:
    found = list(islice(records(source, streaming=first), 1 if first else None))
    name = source.format if source.format != "auto" else fallback
    known = find_format(name, task) if name != "auto" else format_of(*found[0], task)
    rows = [read_as(known, value, where) for value, where in found]
    return Part(name_of(source), known.name, rows, [where for _, where in found], source.weight), known


def _halves(part: Part, share: float, seed: int) -> tuple[Part, Part]:
    order = list(range(len(part.rows)))
    random.Random(seed).shuffle(order)
    count = round(len(order) * share)
    if not 0 < count < len(order):
        less = "nothing is held out of" if not count else "nothing is left to learn from of"
        raise DataError(
            f"{less} the {len(order)} examples of {part.name} with a share of {share:g}; "
            f"{'raise' if not count else 'lower'} the share, or name a file of what is held out"
        )
    return part.taken(order[count:]), part.taken(order[:count])
