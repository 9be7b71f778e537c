"""Data larger than memory: rows are read and encoded through `datasets` while the model learns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.utils.data import IterableDataset

from slimtune.data.batches import Encoded, Limit, Objective, PackRows, PadRight, pad_id_of
from slimtune.data.encode import encode_answers, fit, refuse_split, require_offsets
from slimtune.data.formats import find_format, read_as
from slimtune.data.packing import pack
from slimtune.data.reading import Splits, names_of, peek_splits, read_splits
from slimtune.data.settings import DataSettings, Source
from slimtune.data.sources import load_datasets, records
from slimtune.data.tasks.base import EncodedDataset, Remark, Report, held_out_note, sample_of
from slimtune.data.tasks.causal_lm import Conversations, encode_sources
from slimtune.data.texts import positions_of
from slimtune.errors import ConfigError, DataError

BUFFERED = 1000
"""Examples that are drawn from, so that their order is not that of the source, and that are packed together."""


@dataclass
class Counted:
    """What became of the examples so far."""

    read: int = 0
    dropped: int = 0
    truncated: int = 0
    skipped: int = 0

    def reset(self) -> None:
        """Count from 0 again."""
        self.read = self.dropped = self.truncated = self.skipped = 0


@dataclass(frozen=True)
class Reader:
    """Reads a source and encodes its rows one by one."""

    source: Source
    format: str
    tokenizer: Any
    limit: Limit
    bad_rows: str = "error"
    counted: Counted = field(default_factory=Counted)

    def __deepcopy__(self, memo: Any) -> Reader:
        # `datasets` copies what it is given, and what a copy counts nobody would see.
        return self

    def __call__(self) -> Iterator[dict[str, list[int]]]:
        """The examples; raises DataError with the place of a row that can't be learned."""
        known = find_format(self.format)
        for value, where in records(self.source, True, self._bad):
            try:
                answers = encode_answers(read_as(known, value, where), self.tokenizer, where)
            except DataError as error:
                self._bad(error)
                continue
            for example in answers:
                self.counted.read += 1
                length = len(example.input_ids)
                self.limit.refuse([length], 1, f"example ({where})")
                kept = [piece for piece in fit(example, self.limit) if piece.learned]
                self.counted.dropped += not kept
                self.counted.truncated += bool(kept) and length > self.limit.tokens
                yield from ({"input_ids": piece.input_ids, "labels": piece.labels} for piece in kept)

    def _bad(self, error: DataError) -> None:
        if self.bad_rows == "error":
            raise error
        self.counted.skipped += 1


class Endless(IterableDataset):
    """A stream that begins anew, in another order, when it is at its end.

    One that ends would be an epoch, and a resumed run counts the batches that it skips, not the epochs.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for time in itertools.count():
            # `datasets` adds the epoch to the seed of its shuffle: another order each time, the same again on resuming.
            self.stream.set_epoch(time)
            left = 0
            for left, example in enumerate(self.stream, 1):  # noqa: B007 - counts
                yield example
            if not left:
                raise DataError("no example of the stream is left to learn from; raise max_length")


@dataclass(frozen=True)
class Streamed(Conversations):
    """Conversations and texts of which only the first were looked at so far."""

    @classmethod
    def open(cls, settings: DataSettings, task: str, seed: int) -> Streamed:
        """The formats of the sources, and what is held out in full; raises ConfigError for what needs all rows."""
        if settings.held_out_share:
            raise ConfigError(
                f"a share of {settings.held_out_share:g} can't be held out of a stream, whose length isn't known; "
                f"name a source of what is held out"
            )
        splits = peek_splits(settings, task)
        if splits.task != "text":
            raise ConfigError(f"streaming is for models that write text, and not for task {splits.task}; leave it out")
        refuse_split([row for source in splits.train for row in source.rows], settings.too_long)
        if settings.held_out_sources:
            whole = replace(settings, train=settings.held_out_sources, held_out=0.0)
            splits = Splits(splits.task, splits.train, read_splits(whole, "text").train)
        return cls(splits, settings, seed)

    def encode(self, model: Any, tokenizer: Any) -> EncodedDataset:
        """A stream of ids, of which the first is read for the report; raises DataError, ConfigError."""
        settings = self.settings
        self.prepare(model, tokenizer)
        require_offsets(tokenizer)
        limit = Limit(settings.max_length, settings.too_long, positions_of(model))
        readers = self._readers(tokenizer, limit)
        held_out_rows = encode_sources(self.splits.held_out, settings, tokenizer, limit.positions)
        held_out = [example for rows in held_out_rows for example in rows.examples]
        stream = self._mixed(readers)
        first = sample_of(Encoded(**next(iter(Endless(stream)))), tokenizer)
        for reader in readers:
            reader.counted.reset()
        facts = {
            "source": names_of(self.splits.train),
            "examples": "streamed",
            "held out": len(held_out),
            "maximum length": settings.max_length,
        }
        pad_id = pad_id_of(tokenizer)
        collate: Any = PackRows.of(model, pad_id) if settings.packing else PadRight(pad_id)
        objective = Objective(lambda items: collate([as_examples(item) for item in items]))
        if settings.packing:
            stream = stream.map(_packed, batched=True, batch_size=BUFFERED, fn_kwargs={"room": limit.max_length})
        report = [*self._report(len(held_out)), first]
        return EncodedDataset(Endless(stream), held_out, facts, report, objective, after=lambda: _counts(readers))

    def _readers(self, tokenizer: Any, limit: Limit) -> list[Reader]:
        pairs = zip(self.settings.train, self.splits.train, strict=True)
        return [
            Reader(
                replace(source, fields=rows.fields or source.fields), rows.format, tokenizer, limit,
                self.settings.bad_rows,
            )
            for source, rows in pairs
        ]  # fmt: skip

    def _mixed(self, readers: Sequence[Reader]) -> Any:
        """One stream of all sources: by their weights, else in turn; in another order than theirs."""
        datasets = load_datasets()
        ids = datasets.List(datasets.Value("int64"))
        # Said, or it would read the head of each source to find out.
        columns = datasets.Features({"input_ids": ids, "labels": ids})
        build = datasets.IterableDataset.from_generator
        streams = [build(_run, features=columns, gen_kwargs={"reader": reader}) for reader in readers]
        weights = [source.weight for source in self.settings.train if source.weight is not None]
        if weights:
            shares = [weight / sum(weights) for weight in weights]
            # "all_exhausted": a source that ends begins anew until the longest has ended, so that the weights hold to
            # the end.
            stream = datasets.interleave_datasets(streams, shares, self.seed, stopping_strategy="all_exhausted")
        else:
            stream = datasets.interleave_datasets(streams, stopping_strategy="all_exhausted_without_replacement")
        # A buffer and not a shuffle: the order is random within a thousand examples, and the source's beyond that.
        return stream.shuffle(seed=self.seed, buffer_size=BUFFERED)

    def _report(self, held_out: int) -> Report:
        report: Report = []
        for source in self.splits.train:
            share = "" if source.weight is None else f", drawn by weight {source.weight:g}"
            report.append(Remark(f"{source.name}: format {source.format}, streamed{share}"))
        what = {"error": "stop the training", "drop": "are dropped", "split": "are split"}
        rest = (
            f"data: streamed, so that neither examples nor tokens are counted beforehand; examples longer than "
            f"{self.settings.max_length:,} tokens {what.get(self.settings.too_long, 'are cut')}"
            + held_out_note(held_out, "examples ")
        )
        return [*report, Remark(rest)]


def as_examples(item: dict[str, Any] | Encoded) -> Encoded | list[Encoded]:
    """An example, or a packed row of several, from the columns of a stream; what is held out is one already."""
    if isinstance(item, Encoded):
        return item
    if item["input_ids"] and isinstance(item["input_ids"][0], list):
        return [Encoded(*pair) for pair in zip(item["input_ids"], item["labels"], strict=True)]
    return Encoded(**item)


def _run(reader: Reader) -> Iterator[dict[str, list[int]]]:
    return reader()


def _packed(columns: dict[str, list[list[int]]], room: int) -> dict[str, list[list[list[int]]]]:
    """Examples by column as rows of several."""
    pairs = zip(columns["input_ids"], columns["labels"], strict=True)
    rows = pack([Encoded(ids, labels) for ids, labels in pairs], room)
    return {name: [[getattr(example, name) for example in row] for row in rows] for name in ("input_ids", "labels")}


def _counts(readers: Sequence[Reader]) -> dict[str, Any]:
    """What was counted while the model learned."""
    counts = [reader.counted for reader in readers]
    if not sum(count.read for count in counts):
        # Workers of their own read, and what they count stays with them.
        return {}
    skipped = sum(count.skipped for count in counts)
    return {
        "examples read": sum(count.read for count in counts),
        "dropped": sum(count.dropped for count in counts),
        "cut": sum(count.truncated for count in counts),
        **({"rows skipped": skipped} if skipped else {}),
    }
