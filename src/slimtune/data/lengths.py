"""How long examples are, and what padding, packing and a maximum length do to them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from slimtune.data.packing import best_fit
from slimtune.errors import check_whole

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Lengths:
    """The lengths of examples in tokens.

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
        """The number of examples."""
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
        # Nearest rank, without interpolation: a length that an example really has.
        return self.tokens[max(0, math.ceil(share / 100 * self.examples) - 1)]

    def over(self, max_length: int) -> int:
        """How many examples are longer, and would be dropped or cut."""
        return sum(length > max_length for length in self.tokens)

    def within(self, max_length: int) -> Lengths:
        """The lengths after truncation to a maximum; learned tokens shrink in proportion."""
        check_whole("max_length", max_length, 2)
        # The order stays, for cutting is monotonous: the result needs no sorting.
        cut = tuple(min(length, max_length) for length in self.tokens)
        learned = self.learned if self.labels else round(self.learned * sum(cut) / self.total)
        return Lengths(cut, learned, self.labels)

    def padded(self, batch_size: int) -> float:
        """Tokens of one epoch with padding, expected over all orders: each batch is as long as its longest example.

        Of B examples drawn from N in order of length, the k-th is the longest with C(k-1, B-1) / C(N, B).
        """
        check_whole("batch_size", batch_size)
        size = min(batch_size, self.examples)
        # From the longest down, each weight from the one before: C(N, B) of thousands of examples overflows a float.
        weight, mean = size / self.examples, 0.0
        for k in range(self.examples, size - 1, -1):
            mean += weight * self.tokens[k - 1]
            # C(k-2, B-1) / C(k-1, B-1) = (k - B) / (k - 1).
            weight *= (k - size) / (k - 1) if k > 1 else 0.0
        # N / B batches of B rows, each as long as the expected longest: N times that.
        return mean * self.examples

    def padding_waste(self, batch_size: int) -> float:
        """The share of the padded tokens that is padding."""
        return 1 - self.total / self.padded(batch_size)

    def packed_rows(self, max_length: int) -> int:
        """How many rows of `max_length` hold all examples, packed as training packs them."""
        return len(best_fit(self.within(max_length).tokens, max_length))

    def packed_waste(self, max_length: int) -> float:
        """The share of packed rows of `max_length` that stays empty."""
        return 1 - self.within(max_length).total / (self.packed_rows(max_length) * max_length)

    def histogram(self, bars: int = 10) -> list[tuple[int, int]]:
        """The greatest length of each of at most `bars` equal ranges, and how many examples are in it."""
        shortest = self.tokens[0]
        # Whole tokens, rounded up: with a fraction the last bar would hold the longest example alone.
        width = (self.longest - shortest) // bars + 1
        counts = Counter((length - shortest) // width for length in self.tokens)
        return [(min(shortest + (n + 1) * width - 1, self.longest), counts[n]) for n in range(max(counts) + 1)]

    def packing_gain(self, max_length: int, batch_size: int) -> float:
        """How many times fewer tokens a packed epoch computes than a padded one."""
        return self.within(max_length).padded(batch_size) / (self.packed_rows(max_length) * max_length)


def sorted_lengths(lengths: Sequence[int], learned: int, labels: Sequence[str] = ()) -> Lengths:
    """Lengths from examples in any order."""
    return Lengths(tuple(sorted(lengths)), learned, tuple(labels))
