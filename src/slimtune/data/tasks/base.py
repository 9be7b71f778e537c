"""What every task shares: the rows of an epoch, and the encoded dataset that a model is trained on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from slimtune.data.batches import Objective
from slimtune.data.encode import Encoded, pieces
from slimtune.data.mixing import drawn, exact_shares
from slimtune.data.reading import Parts, sources_of
from slimtune.data.settings import DataSettings
from slimtune.errors import ConfigError, DataError, listing

SAMPLED_TOKENS = 400


@dataclass(frozen=True)
class Remark:
    """A sentence about the data, for people.

    Attributes:
        text: the sentence, or the rest of it behind `warning`.
        warning: how it begins if something was lost, such as "3 texts dropped".
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
"""What there is to tell of a dataset, in the order in which it is read."""


def sample_of(example: Encoded, tokenizer: Any) -> Sample:
    """Decode the first tokens of an example, split by whether they are learned."""
    shortened = Encoded(example.input_ids[:SAMPLED_TOKENS], example.labels[:SAMPLED_TOKENS])
    decoded = [(learned, tokenizer.decode(ids)) for learned, ids in pieces(shortened)]
    return Sample(decoded + [(False, " ...")] * (len(example.input_ids) > SAMPLED_TOKENS))


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


def epoch_of(
    parts: Parts,
    settings: DataSettings,
    seed: int,
    of_texts: Sequence[str] = ("packing", "streaming", "chat_template"),
) -> tuple[list[Any], list[Any]]:
    """The rows of one epoch of all sources, and those held out; raises ConfigError for settings `of_texts` alone."""
    for name in of_texts:
        if getattr(settings, name):
            raise ConfigError(f"{name} is for models that write text, and not for task {parts.task}; leave it out")
    if settings.too_long == "split":
        raise ConfigError(
            f"too_long: split is for texts to go on with, and not for task {parts.task}; drop or truncate"
        )
    shares = zip(parts.train, exact_shares(parts.train), strict=True)
    rows = [row for part, count in shares for row in drawn(part.rows, count, seed)]
    return rows, [row for part in parts.held_out for row in part.rows]


@dataclass(frozen=True)
class TaskData:
    """The rows of one epoch of all sources and those held out, and how long one may be.

    A task's data is a subclass with two methods: `load`, which takes what `slimtune.models.load.load` does, and
    `encode(model, tokenizer)`, which returns an `EncodedDataset`.

    Attributes:
        source: what the sources are called.
    """

    source: str
    rows: list[Any]
    held_out: list[Any]
    max_length: int
    too_long: str

    def facts(self, examples: int, held_out: int, tokens: int, limit: int, **more: Any) -> dict[str, Any]:
        """What a model card says of the data."""
        counted = {"source": self.source, "examples": examples, "held out": held_out, "tokens": f"{tokens:,}"}
        return counted | more | {"maximum length": limit}


def refuse_unlearned(parts: Parts, what: str, learned: Collection[str], held_out: Iterable[str]) -> None:
    """Raises: DataError, where held-out rows have labels (or tags: `what`) that no row to learn from has."""
    unknown = set(held_out) - set(learned)
    if unknown:
        there, here = sources_of(parts.held_out), sources_of(parts.train)
        raise DataError(f"{there} has {what} that {here} hasn't: {listing(unknown)}; correct them")


def held_out_note(count: int, what: str) -> str:
    """The end of a sentence that tells how many are held out, if any are."""
    return f"; {count:,} {what}held out" if count else ""
