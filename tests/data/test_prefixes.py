"""Batches of examples that begin alike: each example once, alike ones together, in another order each epoch."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimtune.data.batches import Encoded, PadRight
from slimtune.data.prefixes import GroupedSampler, PrefixGroups, beginnings, sample_batches, tokens_of
from slimtune.ops.prefix_tree import SHORTEST_SHARED


def documents(count: int, questions: int, begin: int = 20) -> list[list[int]]:
    """Questions on each of some documents, in no order."""
    drawn = random.Random(3)
    texts = [[drawn.randrange(60) for _ in range(begin)] for _ in range(count)]
    rows = [[*text, *(drawn.randrange(60) for _ in range(drawn.randint(3, 9)))] for text in texts * questions]
    drawn.shuffle(rows)
    return rows


TREES = st.lists(st.lists(st.sampled_from([[1] * 9, [2] * 9, [3], [70000]]), max_size=5), min_size=1, max_size=30)


@given(TREES, st.integers(1, 9), st.integers(0, 9))
def test_an_order_has_each_example_once_and_keeps_branches_together(
    pieces: list[list[list[int]]], size: int, seed: int
) -> None:
    rows = [[token for piece in row for token in piece] for row in pieces]
    order = PrefixGroups(rows).order(size, random.Random(seed))
    assert sorted(order) == list(range(len(rows)))
    # Uncut: what begins with the same whole pieces stands together.
    whole = [rows[number] for number in PrefixGroups(rows).order(len(rows), random.Random(seed))]
    for begin in ([1] * 9, [2] * 9, [1] * 9 + [2] * 9):
        at = [place for place, row in enumerate(whole) if row[: len(begin)] == begin]
        assert at == list(range(at[0], at[-1] + 1)) if at else True


def test_a_batch_is_of_one_document_and_batches_come_in_any_order() -> None:
    rows = documents(count=12, questions=4)
    order = PrefixGroups(rows).order(4, random.Random(0))
    batches = [order[at : at + 4] for at in range(0, 48, 4)]
    of_document = [{tuple(rows[number][:20]) for number in batch} for batch in batches]
    assert all(len(documents) == 1 for documents in of_document)
    # Neither the order of the data nor that of the tokens.
    firsts = [min(documents) for documents in of_document]
    assert firsts != sorted(firsts)


@pytest.mark.parametrize("shared", [0, SHORTEST_SHARED - 3])
def test_where_too_little_is_shared_any_order_may_come(shared: int) -> None:
    drawn = random.Random(0)
    groups = PrefixGroups([[*([5] * shared), first, 9] for first in (1, 1, 2, 2)])
    seen = {tuple(groups.order(2, drawn)) for _ in range(600)}
    assert len(seen) == 24


def test_what_is_left_over_comes_last_and_each_epoch_draws_anew() -> None:
    epochs = iter((0, 0, 1))
    sampler = GroupedSampler(PrefixGroups(documents(5, 3)), 15, 4, seed=1, epoch=lambda: next(epochs))
    orders = [list(sampler) for _ in range(3)]
    assert orders[0] == orders[1] != orders[2]
    assert len(sampler) == len(set(orders[2])) == 15
    other = GroupedSampler(sampler.groups, 15, 4, seed=2, epoch=lambda: 0)
    assert list(other) != orders[0]


def test_grouped_batches_compute_fewer_tokens() -> None:
    rows = documents(count=12, questions=4)
    examples = [Encoded(row, row) for row in rows]

    def collate(numbers: list[int]) -> Any:
        return PadRight(0)([examples[number] for number in numbers])

    at_random = tokens_of(sample_batches(collate, 48, 4, seed=0))
    grouped = tokens_of(sample_batches(collate, 48, 4, 0, PrefixGroups(rows)))
    assert grouped.computed < 0.6 * at_random.computed
    assert grouped.pays


@pytest.mark.parametrize(
    "collate",
    [lambda numbers: numbers, lambda numbers: {"pixel_values": torch.zeros(1)},
     lambda numbers: {"input_ids": torch.zeros(1, 2, 3)}],
)  # fmt: skip
def test_what_is_no_row_of_tokens_is_not_counted(collate: Callable[[list[int]], Any]) -> None:
    sampled = sample_batches(collate, 4, 2, seed=0)
    assert sampled == []
    assert not tokens_of(sampled).pays


def test_examples_are_grouped_by_their_tokens_or_not_at_all() -> None:
    assert beginnings([Encoded([1, 2], [1, 2])]) == [[1, 2]]
    assert beginnings([{"input_ids": [1, 2], "labels": 0}]) == [[1, 2]]
    assert beginnings([[Encoded([1], [1])]]) is None
    assert beginnings([{"pixel_values": 0}]) is None
    assert beginnings(iter([])) is None
