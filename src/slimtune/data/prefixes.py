"""What the examples of a data set begin with alike: how much of their batches needs computing, and batches by it.

`sample_batches` counts on a few batches what sharing saves (`models.shared_prefixes`); training and the planner decide
by the same count. `PrefixGroups` is an order of the examples in which those that begin alike share a batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

from slimtune.data.batches import Encoded
from slimtune.models.shared_encodings import distinct_rows
from slimtune.models.shared_prefixes import SharedTokens
from slimtune.ops.prefix_tree import SHORTEST_SHARED, prefix_tree

SAMPLED = 4
"""Batches that are looked at to see whether sharing pays."""


@dataclass(frozen=True)
class SampledBatch:
    """A batch that training may draw: the numbers of its examples, and how many of its tokens need computing."""

    examples: list[int]
    tokens: SharedTokens


def sample_batches(
    collate: Callable[[list[int]], Mapping[str, Tensor]],
    count: int,
    batch_size: int,
    seed: int,
    groups: PrefixGroups | None = None,
    whole_rows: bool = False,
) -> list[SampledBatch]:
    """A few batches as training draws them; none where they aren't rows of tokens.

    Args:
        whole_rows: only rows that are equal from end to end are shared, as by an encoder.
        collate: the batch of the examples of these numbers, which go up to `count`.
        groups: by which batches are drawn, if they are.
    """
    size = min(batch_size, count)
    drawn = random.Random(seed)
    if groups is None:
        batches = [drawn.sample(range(count), size) for _ in range(SAMPLED)]
    else:
        # Behind the last whole batch is what was left over.
        order = groups.order(size, drawn)
        batches = [order[at : at + size] for at in range(0, count - size + 1, size)][:SAMPLED]
    sampled = []
    for examples in batches:
        batch = collate(examples)
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if ids is None or ids.dim() != 2:
            return []
        mask = batch.get("attention_mask")
        if whole_rows:
            tokens = SharedTokens(ids.numel(), len(distinct_rows(ids, mask)[0]) * ids.shape[1])
        else:
            tokens = SharedTokens.of(prefix_tree(ids, mask, batch.get("position_ids")), *ids.shape)
        sampled.append(SampledBatch(examples, tokens))
    return sampled


def tokens_of(sampled: Sequence[SampledBatch]) -> SharedTokens:
    """The tokens of some batches together."""
    total = SharedTokens()
    for batch in sampled:
        total.add(batch.tokens)
    return total


@dataclass
class _Branch:
    """Examples that are alike in their first `depth` tokens: numbers of examples, and branches where more is alike."""

    depth: int
    children: list[_Branch | int] = field(default_factory=list)

    def siblings(self) -> list[_Branch | int]:
        """The children; of a branch that is hardly longer than this one its children, as `prefix_tree` has it."""
        siblings, rest = [], [*self.children]
        while rest:
            child = rest.pop()
            if isinstance(child, _Branch) and child.depth - self.depth < SHORTEST_SHARED:
                rest += child.children
            else:
                siblings.append(child)
        return siblings


class PrefixGroups:
    """The examples of a data set as a tree of what they begin with.

    Args:
        rows: token ids of each example, or of what it begins with.
    """

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        arrays = [np.asarray(row, dtype=np.int64) for row in rows]
        # Big-endian bytes stand in the order of the numbers.
        by_tokens = sorted(range(len(arrays)), key=lambda number: arrays[number].astype(">i8").tobytes())
        # What each example shares with the next; those of a branch share the least of these.
        shared = [_common(arrays[one], arrays[other]) for one, other in pairwise(by_tokens)]
        path, last = [_Branch(0)], None
        for number, depth in zip(by_tokens, [0, *shared], strict=True):
            last = _close(path, last, depth)
            if last is not None:
                path[-1].children.append(last)
            last = number
        for branch in reversed(path):
            branch.children += [] if last is None else [last]
            last = branch
        self.root = path[0]

    def order(self, batch_size: int, drawn: random.Random) -> list[int]:
        """Numbers of all examples: siblings shuffled, cut into batches, and these shuffled, a shorter one the last."""
        order: list[int] = []
        rest: list[_Branch | int] = [self.root]
        while rest:
            child = rest.pop()
            if isinstance(child, _Branch):
                siblings = child.siblings()
                drawn.shuffle(siblings)
                rest += siblings
            else:
                order.append(child)
        whole = len(order) - len(order) % batch_size
        batches = [order[at : at + batch_size] for at in range(0, whole, batch_size)]
        drawn.shuffle(batches)
        return [number for batch in batches for number in batch] + order[whole:]


def _common(one: Any, other: Any) -> int:
    """How many tokens both begin with."""
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differ[0]) if len(differ) else shorter


def _close(path: list[_Branch], last: _Branch | int | None, depth: int) -> _Branch | int | None:
    """Close the branches below `depth`, `last` their last child; a branch of that depth is the last of the path."""
    while path[-1].depth > depth:
        closed = path.pop()
        closed.children += [] if last is None else [last]
        last = closed
    if path[-1].depth < depth:
        path.append(_Branch(depth))
    return last


class GroupedSampler(Sampler[int]):
    """Draws examples so that those which begin alike share a batch, another order in each epoch.

    Args:
        batch_size: of all processes together, so that they share the batches of one.
        epoch: tells the epoch that begins, from 0.
    """

    def __init__(self, groups: PrefixGroups, count: int, batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.groups, self.count, self.batch_size, self.seed, self.epoch = groups, count, batch_size, seed, epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(self.groups.order(self.batch_size, random.Random(f"{self.seed} {self.epoch()}")))


def beginnings(examples: Any) -> Sequence[Sequence[int]] | None:
    """Token ids by which examples are grouped; None for streams, packed rows and what isn't text."""
    columns = getattr(examples, "column_names", None)
    if columns is not None and hasattr(examples, "__len__"):
        # TRL's names for what pairs and answers begin with.
        name = next((n for n in ("prompt_ids", "prompt_input_ids", "input_ids") if n in columns), None)
        return None if name is None else examples[name][:]
    if not isinstance(examples, Sequence) or not len(examples):
        return None
    if isinstance(examples[0], Encoded):
        return [example.input_ids for example in examples]
    if isinstance(examples[0], Mapping) and "input_ids" in examples[0]:
        return [example["input_ids"] for example in examples]
    return None
