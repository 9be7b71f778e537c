"""The spectra of all matrices of a tuned model, one after the other; `decomposition` has the formulas."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from slimtune.errors import BaseMismatchError, check_number, check_whole
from slimtune.evaluate.intruders.svd import (
    EPSILON,
    TOP,
    Decomposition,
    decompose,
    decompose_product,
    effective_rank,
    nearest_cosines,
    overlap,
    stable_rank,
)
from slimtune.evaluate.intruders.updates import TunedMatrix, Update, Updates, adapter_updates, model_updates
from slimtune.evaluate.tuned import Tuned


@dataclass(frozen=True)
class Intruder:
    """A singular vector of W' that is like none of W.

    Attributes:
        index: its place among the singular vectors of W', from 0.
        cosine: the largest |cosine| with a singular vector of W.
        value: its singular value in W'.
    """

    index: int
    cosine: float
    value: float


@dataclass(frozen=True)
class Overlap:
    """How much of the leading subspaces two updates of one matrix share, from 0 to 1.

    Attributes:
        directions: how many leading singular vectors of each were compared.
        left: on the side of the outputs.
        right: on the side of the inputs.
        left_by_chance: the mean for subspaces drawn at random.
        right_by_chance: likewise.
    """

    directions: int
    left: float
    right: float
    left_by_chance: float
    right_by_chance: float


@dataclass(frozen=True)
class Spectrum:
    """What tuning did to one matrix.

    Attributes:
        values: the singular values of W' - W, falling.
        relative_norm: ||W' - W|| / ||W||.
        cosines: of each of the leading left singular vectors of W', the largest |cosine| with one of W.
    """

    name: str
    layer: int | None
    kind: str
    shape: tuple[int, int]
    values: list[float]
    effective_rank: float
    stable_rank: float
    relative_norm: float
    cosines: list[float]
    intruders: list[Intruder]
    overlap: Overlap | None = None


@dataclass(frozen=True)
class Spectra:
    """What tuning did to all matrices of a model.

    Attributes:
        top: how many singular vectors of each W' were looked at.
        epsilon: below which cosine one is an intruder.
        left_out: the embeddings and heads that were tuned and not looked at.
        only_here: with another model beside, the matrices that it hasn't tuned.
    """

    matrices: list[Spectrum]
    top: int
    epsilon: float
    left_out: list[str]
    only_here: list[str]
    seconds: float

    @property
    def intruders(self) -> int:
        """How many intruder dimensions all matrices have together."""
        return sum(len(one.intruders) for one in self.matrices)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON; of the matrices' figures, the medians stand in front."""
        overlaps = [one.overlap for one in self.matrices if one.overlap]
        return {
            "count": len(self.matrices),
            "intruders": self.intruders,
            "matrices_with_intruders": sum(bool(one.intruders) for one in self.matrices),
            "effective_rank": median(one.effective_rank for one in self.matrices),
            "stable_rank": median(one.stable_rank for one in self.matrices),
            "relative_norm": median(one.relative_norm for one in self.matrices),
            "overlap": median(one.left for one in overlaps) if overlaps else None,
            **asdict(self),
        }


def updates_of(tuned: Tuned, embeddings: bool = False) -> Updates:
    """The matrices that tuning changed.

    Args:
        embeddings: take embeddings and heads in.

    Raises:
        ConfigError, BaseMismatchError: as `adapter_updates` and `model_updates`.
    """
    model, _ = tuned.load()
    if tuned.is_adapter:
        return adapter_updates(model, model.active_adapter, embeddings)
    return model_updates(tuned.load_base(), model, embeddings)


def measure(
    updates: Updates,
    top: int = TOP,
    epsilon: float = EPSILON,
    against: Updates | None = None,
    on_matrix: Callable[[], None] | None = None,
) -> Spectra:
    """Take apart what tuning did to each matrix.

    Args:
        top: how many leading singular vectors of each W' are looked at for intruders, and of two updates compared.
        epsilon: below which largest |cosine| a singular vector is an intruder.
        against: of another model that was tuned from the same base, for the overlap of the updates.
        on_matrix: called after each.

    Raises:
        ConfigError: a number out of range.
        BaseMismatchError: the models are of different shapes.
    """
    check_whole("top", top)
    # `below` is an open bound, and epsilon = 1 is allowed: every vector that isn't the base's own counts then.
    check_number("epsilon", epsilon, 0, 1.0 + 1e-9)
    began = time.monotonic()
    others = {one.name: one for one in against.matrices} if against else {}
    spectra = []
    for matrix in updates.matrices:
        spectra.append(spectrum(matrix, top, epsilon, other=others.get(matrix.name)))
        if on_matrix:
            on_matrix()
    only_here = [one.name for one in updates.matrices if one.name not in others] if against else []
    return Spectra(spectra, top, epsilon, updates.left_out, only_here, time.monotonic() - began)


@torch.no_grad()
def spectrum(
    matrix: TunedMatrix,
    top: int = TOP,
    epsilon: float = EPSILON,
    left: Tensor | None = None,
    other: TunedMatrix | None = None,
) -> Spectrum:
    """Take apart what tuning did to one matrix.

    Args:
        left: the left singular vectors of W, where they are known from before.
        other: the same matrix of another tuned model.
    """
    update = matrix.read()
    change = change_of(update)
    rows, columns = update.before.shape
    values, cosines = _cosines(update, change, top, left)
    return Spectrum(
        name=matrix.name,
        layer=matrix.layer,
        kind=matrix.kind,
        shape=(rows, columns),
        values=change.values.tolist(),
        effective_rank=effective_rank(change.values),
        stable_rank=stable_rank(change.values),
        relative_norm=float(change.values.norm() / update.before.norm()),
        cosines=cosines,
        intruders=[Intruder(i, cosine, values[i]) for i, cosine in enumerate(cosines) if cosine < epsilon],
        overlap=_overlap(matrix, change, other, top) if other else None,
    )


def change_of(update: Update) -> Decomposition:
    """The decomposition of W' - W."""
    return decompose_product(*update.factors) if update.factors else decompose(update.after - update.before)


def _cosines(update: Update, change: Decomposition, top: int, left: Tensor | None) -> tuple[list[float], list[float]]:
    """The leading singular values of W', and how near each one's left singular vector comes to one of W."""
    # No change, no intruder: W' = W, and the cosines would be 1 but for degenerate singular values.
    if not change.values.any():
        return [], []
    # Against all of W's vectors, not its leading ones: a vector that only moved to another place is no intruder.
    after = decompose(update.after)
    cosines = nearest_cosines(after.left[:, :top], decompose(update.before).left if left is None else left)
    return after.values[:top].tolist(), cosines.tolist()


def _overlap(matrix: TunedMatrix, change: Decomposition, other: TunedMatrix, top: int) -> Overlap:
    theirs = change_of(other.read())
    if change.left.shape[0] != theirs.left.shape[0] or change.right.shape[0] != theirs.right.shape[0]:
        raise BaseMismatchError(
            f"'{matrix.name}' has other shapes in the two models; compare what was tuned from the same base"
        )
    # Directions beyond an update's rank are rounding's: orthonormal, and about nothing.
    n = min(top, change.rank, theirs.rank)
    rows, columns = len(change.left), len(change.right)
    left, right = (
        overlap(mine[:, :n], its[:, :n])
        for mine, its in ((change.left, theirs.left), (change.right, theirs.right))
    )  # fmt: skip
    # By chance phi is max(i, j) / d, here with i = j = n.
    return Overlap(n, left, right, n / rows, n / columns)


@torch.no_grad()
def similarity(matrix: TunedMatrix, directions: int) -> Tensor:
    """|cos(y_j, x_i)| of the leading left singular vectors of W' (rows) and of W (columns)."""
    update = matrix.read()
    after, before = (decompose(one).left[:, :directions] for one in (update.after, update.before))
    return (after.mT @ before).abs().cpu()
