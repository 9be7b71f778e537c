"""Several sources in one epoch: all of each, or the share of it that their weights say."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

from slimtune.data.encode import Encoded, Prepared, encode
from slimtune.data.reading import Part
from slimtune.data.settings import DataSettings

T = TypeVar("T")


def prepare(
    parts: Sequence[Part], settings: DataSettings, tokenizer: Any, positions: int | None = None
) -> list[Prepared]:
    """The rows of each part encoded; raises DataError.

    Args:
        positions: how many the model has.
    """
    limit, too_long = settings.max_length, settings.too_long
    return [encode(part.rows, tokenizer, limit, too_long, part.places, positions) for part in parts]


def exact_shares(parts: Sequence[Part], counts: Sequence[int] | None = None) -> list[int]:
    """How many examples an epoch takes of each source: all without weights, else by weight as many as there are in all.

    Numbers are rounded so that they add up, the largest remainders first.

    Args:
        counts: examples that each source has, if not as many as rows.
    """
    there = [len(part.rows) for part in parts] if counts is None else list(counts)
    weights = [part.weight for part in parts if part.weight is not None]
    if not weights:
        return there
    exact = [sum(there) * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for index in by_remainder[: sum(there) - sum(shares)]:
        shares[index] += 1
    return shares


def drawn(examples: Sequence[T], count: int, seed: int) -> list[T]:
    """So many of the examples, all in their order as often as that goes, and the rest drawn by seed."""
    times, rest = divmod(count, len(examples))
    return [*list(examples) * times, *random.Random(seed).sample(list(examples), rest)]


def mixed(parts: Sequence[Part], prepared: Sequence[Prepared], seed: int) -> list[Encoded]:
    """The examples of one epoch."""
    shares = exact_shares(parts, [len(found.examples) for found in prepared])
    pairs = zip(prepared, shares, strict=True)
    return [example for found, share in pairs for example in drawn(found.examples, share, seed)]
