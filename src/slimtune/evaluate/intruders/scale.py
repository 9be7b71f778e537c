"""Intruder dimensions scaled down (Shuttleworth et al. 2024, arXiv:2410.21228): less forgotten, at some cost.

W'' = W' + (c - 1) sum_j s_j y_j z_j^T over the intruders j of W', with their left and right singular vectors y_j and
z_j and singular values s_j: c = 1 changes nothing, c = 0 takes them out. The decomposition is that of W' = W + dW, as
in the paper, and not of dW.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from slimtune.adapters.adapter import attached
from slimtune.bases import base_of
from slimtune.errors import ConfigError
from slimtune.evaluate.intruders.spectra import Spectra
from slimtune.evaluate.intruders.svd import Decomposition, decompose, decompose_product, intruders
from slimtune.evaluate.intruders.updates import TunedMatrix, Updates, factors_of
from slimtune.methods.lora.layers import LoraDelta

Pair = tuple[Tensor, Tensor]
"""B_OR and A_RI, whose product is a change of a weight."""


@dataclass(frozen=True)
class Scaling:
    """What is added to one tuned matrix.

    Attributes:
        change: W'' - W' as factors.
        left: how many intruders W'' still has.
    """

    matrix: TunedMatrix
    change: Pair
    scaled: int
    left: int

    @torch.no_grad()
    def weight(self) -> Tensor:
        """W'' in float32, (out, in)."""
        return self.matrix.read().after + self.change[0] @ self.change[1]


@torch.no_grad()
def scalings(
    updates: Updates, spectra: Spectra, factor: float, on_matrix: Callable[[], None] | None = None
) -> list[Scaling]:
    """What scaling the intruders that were found by `factor` adds to each matrix that has some."""
    chosen = {one.name: [intruder.index for intruder in one.intruders] for one in spectra.matrices if one.intruders}
    result = []
    for matrix in updates.matrices:
        if matrix.name in chosen:
            result.append(_scaling(matrix, chosen[matrix.name], factor, spectra))
            if on_matrix:
                on_matrix()
    return result


def _scaling(matrix: TunedMatrix, which: list[int], factor: float, spectra: Spectra) -> Scaling:
    update = matrix.read()
    change = scaled_change(decompose(update.after), which, factor)
    # Anew: with an intruder scaled down, its direction may blend with another and count again.
    again = decompose(update.after + change[0] @ change[1])
    left = intruders(again, decompose(update.before).left, spectra.top, spectra.epsilon)
    return Scaling(matrix, change, len(which), len(left))


def scaled_change(after: Decomposition, which: list[int], factor: float) -> Pair:
    """(c - 1) sum_j s_j y_j z_j^T as factors."""
    # (out, j) and (j, in) for j intruders: a change of rank j, added to W' and not to dW.
    return after.left[:, which] * ((factor - 1) * after.values[which]), after.right[:, which].mT


def why_no_adapter(model: Any, name: str) -> str:
    """Why an adapter with its intruders scaled isn't one of the same method, a clause; empty where it is."""
    config = model.peft_config[name]
    if config.peft_type != "LORA" or getattr(config, "use_dora", False):
        return f"{'DoRA' if getattr(config, 'use_dora', False) else config.peft_type} has no form for it"
    for site, delta in attached(model, name):
        if site.kind != "linear" or delta.holds or factors_of(delta) is None:
            return f"'{site.name}' holds more than a low-rank pair"
    return ""


@torch.no_grad()
def add_scaled_adapter(model: Any, name: str, new: str, changes: list[Scaling]) -> None:
    """Attach a LoRA with the scaled update as `new`, exact but for rounding, of a higher rank where one was scaled."""
    by_module = {one.matrix.module: one.change for one in changes}
    pairs = {site.name: factors_of(delta) for site, delta in attached(model, name)}
    joined = {path: _joined(pair, by_module.get(path)) for path, pair in pairs.items() if pair is not None}
    ranks = {path: len(a) for path, (_, a) in joined.items()}
    largest = max(ranks.values())
    others = {path: rank for path, rank in ranks.items() if rank != largest}
    # alpha = r, so that the scale is 1: it is inside of the factors.
    config = replace(
        model.peft_config[name], r=largest, lora_alpha=largest, rank_pattern=others, alpha_pattern=dict(others),
        use_rslora=False, init_lora_weights=True, eva_config=None, loftq_config={}, inference_mode=True,
    )  # fmt: skip
    model.add_adapter(new, config)
    for site, delta in attached(model, new):
        assert isinstance(delta, LoraDelta), "why_no_adapter saw to it"
        for parameter, value in zip(delta.trained, reversed(joined[site.name]), strict=True):
            parameter.copy_(value)


def _joined(pair: Pair, change: Pair | None) -> Pair:
    """The factors of a sum of two products, of no more rank than it has, its singular values shared evenly."""
    b, a = pair if change is None else (torch.cat([pair[0], change[0]], dim=1), torch.cat([pair[1], change[1]]))
    if change is None:
        return b, a
    # The two products may cancel in part: the joined rank r + j is an upper bound.
    whole = decompose_product(b, a)
    # At least one direction: a LoRA of rank 0 has no form in the file.
    roots = whole.values[: max(1, whole.rank)].sqrt()
    return whole.left[:, : len(roots)] * roots, (whole.right[:, : len(roots)] * roots).mT


@torch.no_grad()
def write_into(model: Any, weights: dict[str, Tensor]) -> None:
    """Put dense weights (out, in) into a plain model, by the paths of its modules, each rounded once.

    Raises:
        ConfigError: a matrix that is no layer's weight.
    """
    for path, weight in weights.items():
        module = model.get_submodule(path)
        own = module.get_parameter("weight")
        # Viewed back: a convolution's kernel was flattened to (out, in * k) for the decomposition.
        dense = base_of(module).repack(module, {"weight": weight.view(base_of(module).weight(module).shape)})
        own.copy_(dense["weight"])


def scaled_weights(changes: list[Scaling]) -> dict[str, Tensor]:
    """W'' of each matrix by the path of its module. Raises: ConfigError, for what is no layer's weight."""
    for one in changes:
        if one.matrix.parameter != "weight" or one.matrix.expert is not None:
            raise ConfigError(f"'{one.matrix.name}' is no layer's weight, and its intruders can't be scaled")
    return {one.matrix.module: one.weight() for one in changes}
