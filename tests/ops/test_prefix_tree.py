"""A tree has each token of a batch once, and attention over it is what each text gets alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slimtune.ops.prefix_tree import SHORTEST_SHARED, Family, PrefixTree, prefix_tree, tree_attention

HEADS, KEY_HEADS, FEATURES = 4, 2, 4


@st.composite
def texts(draw: st.DrawFn) -> list[list[int]]:
    """Texts that branch: each goes on from a beginning of an earlier one."""
    rows = [draw(st.lists(st.integers(1, 3), min_size=1, max_size=20))]
    for _ in range(draw(st.integers(0, 6))):
        other = draw(st.sampled_from(rows))
        begin = other[: draw(st.integers(0, len(other)))]
        rows.append(begin + draw(st.lists(st.integers(1, 3), min_size=0 if begin else 1, max_size=20)))
    return rows


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, (ids != 0).long()


def packed(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """All texts in one row, with positions that begin anew."""
    return torch.tensor([[token for row in rows for token in row]]), torch.tensor(
        [[at for row in rows for at in range(len(row))]]
    )


@given(texts())
def test_the_batch_can_be_read_from_its_tree(rows: list[list[int]]) -> None:
    ids, mask = padded(rows)
    tree = prefix_tree(ids, mask, None)
    here = mask.bool()
    assert torch.equal(tree.tokens[tree.place][here], ids[here])
    assert torch.equal(tree.positions[tree.place][here], torch.arange(ids.shape[1]).expand_as(ids)[here])
    assert len(tree.tokens) == len(tree.positions) == len(tree.back) <= sum(map(len, rows))
    # Every token of the tree is somebody's.
    assert set(tree.place[here].tolist()) == set(range(len(tree.tokens)))


@given(texts())
def test_packed_rows_give_the_same_tree(rows: list[list[int]]) -> None:
    ids, positions = packed(rows)
    tree, of_padded = prefix_tree(ids, None, positions), prefix_tree(*padded(rows), None)
    assert torch.equal(tree.tokens, of_padded.tokens)
    assert torch.equal(tree.tokens[tree.place[0]], ids[0])
    assert tree.families == of_padded.families


def test_what_is_shared_stands_in_the_tree_once() -> None:
    system, question = list(range(1, 21)), list(range(30, 40))
    rows = [system + question + [50, 51], system + question + [60], [*system, 70, 71, 72]]
    assert len(prefix_tree(*padded(rows), None).tokens) == 20 + 10 + 2 + 1 + 3
    # Too short a beginning is computed again, and equal positions are a part of being equal.
    short = [[1] * (SHORTEST_SHARED - 1) + [2, 2], [1] * (SHORTEST_SHARED - 1) + [3]]
    assert len(prefix_tree(*padded(short), None).tokens) == sum(map(len, short))
    moved = torch.stack([torch.arange(12), torch.arange(12) + 1])
    assert len(prefix_tree(torch.ones(2, 12, dtype=torch.long), None, moved).tokens) == 24


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, None]:
    """(G, H, L, D) to (G, L, H, D), as transformers' functions."""
    answer = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return answer.transpose(1, 2), None


@pytest.mark.parametrize("window", [None, 3, 9])
@given(texts())
def test_attention_is_what_each_text_gets_alone(window: int | None, rows: list[list[int]]) -> None:
    ids, mask = padded(rows)
    tree = prefix_tree(ids, mask, None)
    count = len(tree.tokens)
    drawn = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, count, FEATURES, dtype=torch.float64, generator=drawn, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    # Each token of each text has a weight of its own in the sum of which the gradient is taken.
    weights = torch.randn(*ids.shape, HEADS, FEATURES, dtype=torch.float64, generator=drawn)

    def masked(family: Family, window: int | None, query: Tensor) -> Tensor:
        return tree.mask(family, window)

    def by_tree() -> list[Tensor]:
        answer = tree_attention(attend, tree, None, query, key, value, masked, sliding_window=window)[0]
        return [answer[tree.place[row, : len(text)]] for row, text in enumerate(rows)]

    def alone() -> list[Tensor]:
        answers = []
        for row, text in enumerate(rows):
            places = tree.place[row, : len(text)]
            behind = torch.arange(len(text))[:, None] - torch.arange(len(text))
            allowed = (behind >= 0) & (behind < (window or len(text)))
            answers.append(attend(None, *(x[:, :, places] for x in (query, key, value)), allowed)[0][0])
        return answers

    def gradients(answers: list[Tensor]) -> tuple[Tensor, ...]:
        total = sum((weights[row, : len(answer)] * answer).sum() for row, answer in enumerate(answers))
        return torch.autograd.grad(total, (query, key, value))

    for ours, theirs in zip([*by_tree(), *gradients(by_tree())], [*alone(), *gradients(alone())], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_family_without_a_path_needs_no_mask() -> None:
    tree: PrefixTree = prefix_tree(torch.arange(12)[None], None, None)
    (family,) = tree.families
    assert family.is_plain(None)
    assert family.is_plain(12)
    assert not family.is_plain(11)
