"""Spectra of constructed matrices, of which everything is known beforehand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slimtune.evaluate.intruders.svd import (
    decompose,
    decompose_product,
    effective_rank,
    intruders,
    nearest_cosines,
    overlap,
    stable_rank,
)


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns))[0]


def with_values(values: Tensor, rows: int = 40, columns: int = 30) -> Tensor:
    """A matrix with these singular values and random singular vectors."""
    return orthonormal(rows, len(values)) * values @ orthonormal(columns, len(values)).T


@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 30, 5), (30, 40, 1), (16, 16, 16)])
def test_the_factors_give_what_the_full_matrix_gives(rows: int, columns: int, rank: int) -> None:
    b, a = torch.randn(rows, rank), torch.randn(rank, columns)
    small, full = decompose_product(b, a), decompose(b @ a)
    torch.testing.assert_close(small.values, full.values[:rank], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(small.left * small.values @ small.right.T, b @ a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(small.left.T @ small.left, torch.eye(rank), rtol=0, atol=1e-5)
    assert small.rank == full.rank == rank


def test_ranks_of_known_spectra() -> None:
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert stable_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    p = torch.tensor([0.5, 0.25, 0.25])
    assert effective_rank(4 * p) == pytest.approx(math.exp(1.5 * math.log(2)))
    assert stable_rank(4 * p) == pytest.approx(1.5)


def test_nothing_has_no_rank() -> None:
    zero = decompose(torch.zeros(5, 4))
    assert (effective_rank(zero.values), stable_rank(zero.values), zero.rank) == (0, 0, 0)


def test_overlap_is_one_with_itself_and_zero_with_what_is_orthogonal() -> None:
    basis = orthonormal(20, 8)
    turned = basis[:, :4] @ orthonormal(4, 4)
    assert overlap(basis[:, :4], turned) == pytest.approx(1, abs=1e-6)
    assert overlap(basis[:, :4], basis[:, 4:]) == pytest.approx(0, abs=1e-6)
    assert overlap(basis[:, :2], basis) == pytest.approx(1, abs=1e-6)
    assert overlap(basis[:, :0], basis) == 0


def test_overlap_of_random_subspaces_is_what_chance_gives() -> None:
    found = [overlap(orthonormal(50, 4), orthonormal(50, 10)) for _ in range(100)]
    assert sum(found) / 100 == pytest.approx(10 / 50, rel=0.1)


def test_a_planted_direction_is_an_intruder() -> None:
    outputs, inputs = orthonormal(40, 21), orthonormal(30, 21)
    values = torch.linspace(5, 1, 20)  # of rank 20: the last direction on either side is new
    weight = outputs[:, :20] * values @ inputs[:, :20].T
    before = decompose(weight).left[:, :20]
    tuned = decompose(weight + 4.5 * torch.outer(outputs[:, 20], inputs[:, 20]))
    assert intruders(tuned, before) == [3]  # behind 5.00, 4.79 and 4.58
    assert float(tuned.left[:, 3] @ outputs[:, 20]) ** 2 == pytest.approx(1, abs=1e-5)
    assert intruders(tuned, before, top=3) == []
    assert float(nearest_cosines(tuned.left[:, [3]], before)) < 1e-4


def test_a_direction_that_is_partly_old_is_one_below_its_cosine() -> None:
    outputs, inputs = orthonormal(40, 21), orthonormal(30, 21)
    weight = outputs[:, :20] * torch.linspace(5, 1, 20) @ inputs[:, :20].T
    mixed = 0.8 * outputs[:, 0] + 0.6 * outputs[:, 20]
    tuned = decompose(1000 * torch.outer(mixed, inputs[:, 20]))
    assert intruders(tuned, decompose(weight).left[:, :20], top=1, epsilon=0.75) == []
    assert intruders(tuned, decompose(weight).left[:, :20], top=1, epsilon=0.85) == [0]


def test_a_small_turn_and_other_singular_values_are_none() -> None:
    weight = with_values(torch.linspace(5, 1, 30), 30, 30)
    before = decompose(weight)
    skew = torch.randn(30, 30)
    turn = torch.matrix_exp(1e-3 * (skew - skew.T))
    assert intruders(decompose(turn @ weight), before.left, top=30) == []
    stretched = before.left * (before.values * torch.linspace(2, 1, 30)) @ before.right.T
    assert intruders(decompose(stretched), before.left, top=30) == []


def test_no_change_has_no_intruders() -> None:
    weight = torch.randn(25, 40)
    assert intruders(decompose(weight), decompose(weight).left, top=25, epsilon=0.999) == []
