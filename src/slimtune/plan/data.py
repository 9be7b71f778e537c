"""How long a user's own examples are, and what padding, packing and a maximum length do to them."""

from __future__ import annotations

import math
import sys
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slimtune.data.encode import encode
from slimtune.data.labelled import labels_of, tokenize
from slimtune.data.reading import read_labelled, read_rows, task_of
from slimtune.errors import check_whole

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Lengths:
    """Examples by their number of tokens.

    Attributes:
        tokens: of each example, shortest first.
        learned: tokens of all examples that are learned from; of a text with a label, one.
        labels: of a classifier; none for texts that are written.
    """

    tokens: tuple[int, ...]
    learned: int
    labels: tuple[str, ...] = ()

    @property
    def examples(self) -> int:
        """How many there are."""
        return len(self.tokens)

    @cached_property
    def total(self) -> int:
        """All tokens of one epoch."""
        return sum(self.tokens)

    @property
    def longest(self) -> int:
        """The tokens of the longest example."""
        return self.tokens[-1]

    def percentile(self, share: float) -> int:
        """The length that `share` per cent of the examples don't exceed."""
        return self.tokens[max(0, math.ceil(share / 100 * self.examples) - 1)]

    def over(self, max_length: int) -> int:
        """How many examples are longer, and would be dropped or cut."""
        return sum(length > max_length for length in self.tokens)

    def within(self, max_length: int) -> Lengths:
        """The lengths after cutting at a maximum; what is learned shrinks by the share of tokens that go."""
        check_whole("max_length", max_length, 2)
        cut = tuple(min(length, max_length) for length in self.tokens)
        learned = self.learned if self.labels else round(self.learned * sum(cut) / self.total)
        return Lengths(cut, learned, self.labels)

    def padded(self, batch_size: int) -> float:
        """Tokens of one epoch with padding, expected over all orders: each batch is as long as its longest example.

        Of B examples drawn from N in order of length, the k-th is the longest with C(k-1, B-1) / C(N, B).
        """
        check_whole("batch_size", batch_size)
        size = min(batch_size, self.examples)
        weight, mean = size / self.examples, 0.0
        for k in range(self.examples, size - 1, -1):
            mean += weight * self.tokens[k - 1]
            weight *= (k - size) / (k - 1) if k > 1 else 0.0
        return mean * self.examples

    def padding_waste(self, batch_size: int) -> float:
        """The share of the padded tokens that is padding."""
        return 1 - self.total / self.padded(batch_size)

    def packed_rows(self, max_length: int) -> int:
        """How many rows of `max_length` hold all examples, longest first, each in the fullest row with room for it."""
        rooms: list[int] = []
        count = 0
        for length in reversed(self.within(max_length).tokens):
            place = bisect_left(rooms, length)
            count += place == len(rooms)
            room = rooms.pop(place) if place < len(rooms) else max_length
            insort(rooms, room - length)
        return count

    def packing_gain(self, max_length: int, batch_size: int) -> float:
        """How many times fewer tokens a packed epoch computes than a padded one."""
        return self.within(max_length).padded(batch_size) / (self.packed_rows(max_length) * max_length)


def measure(path: str | Path, tokenizer: Any) -> Lengths:
    """The lengths of a data file's examples as `slimtune train` would read and encode them; raises DataError."""
    path = Path(path)
    if task_of(path) == "classification":
        rows = read_labelled(path)
        encoded = tokenize([row.texts for row in rows], tokenizer, sys.maxsize)
        return _sorted([len(row["input_ids"]) for row in encoded.rows], len(rows), labels_of(rows))
    prepared = encode(read_rows(path), tokenizer, sys.maxsize)
    return _sorted([len(example.input_ids) for example in prepared.examples], prepared.learned)


def uniform(length: int, examples: int) -> Lengths:
    """Examples that are all of one length, where no data was given; all of it is learned."""
    check_whole("length", length, 2)
    check_whole("examples", examples)
    return Lengths((length,) * examples, length * examples)


def _sorted(lengths: Sequence[int], learned: int, labels: Sequence[str] = ()) -> Lengths:
    return Lengths(tuple(sorted(lengths)), learned, tuple(labels))
