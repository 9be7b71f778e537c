"""AWQ: inputs that are large are given finer grids, by scaling weights up there and undoing it in what comes before.

    (W diag(s)) (x / s) = W x,   s_i = E[x_i^2]^(r / 2)

with the share r searched for the least error sum_i E[x_i^2] (W - Q(W s) / s)_i^2. Lin et al.,
https://arxiv.org/abs/2306.00978. What comes before is a norm, or a linear layer whose output is multiplied by a gate or
averaged by attention. Which pairs there are isn't known by names: each candidate is tried with factors of 1/2, 1 and 2,
and taken where the block's output stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.ops.grid import expand, extreme_scales, nearest_codes
from slimtune.slim.calibrate import Block, Moments

SHARES = tuple(step / 12 for step in range(12))
"""What r is searched among; 0 scales nothing."""
_TOLERANCE = 0.01
"""How far the output may move in a trial, of how far it moves where only what comes before is scaled."""


@dataclass(frozen=True)
class Pair:
    """What comes before some linear layers and can take their factors.

    Attributes:
        before: the path in the block of a norm or a linear layer.
        form: how a norm has its weight: as it is, or less one.
        names: of the linear layers whose inputs it makes.
    """

    before: str
    form: str
    names: tuple[str, ...]


@torch.no_grad()
def find_pairs(block: Block, moments: Sequence[Moments]) -> list[Pair]:
    """The pairs of a block; each was tried on its first call."""
    made_by = _makers(block, moments)
    expected = block.run(0)
    found: list[Pair] = []
    for group in moments:
        norm = made_by.get(group.names[0])
        # A norm whose output goes elsewhere, too, as into a residual, fails its trial.
        forms = ("plain", "one-based")
        candidates = [Pair(norm, form, tuple(group.names)) for form in forms] if norm is not None else []
        if len(group.names) == 1:
            candidates += [Pair(name, "linear", (group.names[0],)) for name in _feeding(block, group.names[0], moments)]
        good = next((pair for pair in candidates if _stays(block, pair, expected)), None)
        if good:
            found.append(good)
    return found


def _makers(block: Block, moments: Sequence[Moments]) -> dict[str, str]:
    """Of each group of linear layers by its first name, the norm whose output they take."""
    made: dict[int, tuple[str, Any]] = {}
    makers: dict[str, str] = {}

    def after(name: str) -> Any:
        # Kept, so that no other tensor gets its id.
        return lambda module, args, output: made.__setitem__(id(output), (name, output))

    def before(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if id(args[0]) in made:
                makers[name] = made[id(args[0])][0]

        return note

    handles = []
    for name, module in block.module.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 1:
            handles.append(module.register_forward_hook(after(name)))
    for group in moments:
        linear = block.module.get_submodule(group.names[0])
        handles.append(linear.register_forward_pre_hook(before(group.names[0])))
    try:
        block.run(0)
    finally:
        for handle in handles:
            handle.remove()
    return makers


def _feeding(block: Block, name: str, moments: Sequence[Moments]) -> list[str]:
    """Linear layers beside this one with as many outputs as it has inputs."""
    parent = name.rpartition(".")[0]
    width = block.module.get_submodule(name).in_features
    others = [other for group in moments for other in group.names if other != name]
    return [
        other
        for other in others
        if other.rpartition(".")[0] == parent and block.module.get_submodule(other).out_features == width
    ]


def _stays(block: Block, pair: Pair, expected: Any) -> bool:
    first: Any = block.module.get_submodule(pair.names[0])
    width: int = first.in_features
    # Powers of two are exact in any floating-point type; a fixed order of them, in which neighbours differ.
    factors_I = torch.tensor([0.5, 1.0, 2.0]).repeat(width // 3 + 1)[:width]
    moved = []
    for names in (pair.names, ()):
        with _undone(block, pair):
            scale(block.module, replace(pair, names=names), factors_I)
            moved.append(float((block.run(0).float() - expected.float()).norm()))
    # Not of the output's norm: beside the residual, what a layer adds may be next to nothing.
    return moved[0] <= _TOLERANCE * moved[1]


@contextmanager
def _undone(block: Block, pair: Pair) -> Iterator[None]:
    modules = [block.module.get_submodule(name) for name in (pair.before, *pair.names)]
    kept = [(p, p.detach().clone()) for module in modules for p in module.parameters(recurse=False)]
    try:
        yield
    finally:
        for parameter, own in kept:
            parameter.data.copy_(own)


@torch.no_grad()
def scale(module: nn.Module, pair: Pair, factors_I: Tensor) -> None:
    """Multiply the inputs' columns by the factors and divide what comes before by them, in place."""
    before: Any = module.get_submodule(pair.before)
    factors = factors_I.to(before.weight.device)
    weight = before.weight.float()
    if pair.form == "one-based":
        changed = (1 + weight) / factors - 1
    else:
        changed = weight / (factors[:, None] if pair.form == "linear" else factors)
    before.weight.data.copy_(changed)
    if getattr(before, "bias", None) is not None:
        before.bias.data.copy_(before.bias.float() / factors)
    for name in pair.names:
        linear: Any = module.get_submodule(name)
        linear.weight.data.copy_(linear.weight.float() * factors)


@torch.no_grad()
def search_factors(weight_OI: Tensor, importance_I: Tensor, group_size: int, bits: int) -> Tensor:
    """The factors s (in,) with the least error of codes rounded to the nearest; ones where scaling gains nothing."""
    weight_OI = weight_OI.float()
    size_I = importance_I.sqrt().clamp(min=1e-8)
    best, least = torch.ones_like(size_I), torch.inf
    for share in SHARES:
        s = size_I**share
        # Around one, so that neither side leaves its dtype.
        s = (s / (s.max() * s.min()).sqrt()).clamp(1e-4, 1e4)
        scaled = weight_OI * s
        scales_OG = extreme_scales(scaled, group_size, bits)
        # The unclipped range: the clipping is searched again, for the factors that are taken.
        rounded = expand(nearest_codes(scaled, scales_OG, bits), scales_OG, torch.float32)
        # (out, in): the error of W, not of W s, each input weighted by how large it is.
        error = float((rounded.sub_(scaled).div_(s).square_() * importance_I).sum())
        if error < least:
            best, least = s, error
    return best


@torch.no_grad()
def apply_awq(
    block: Block, moments: Sequence[Moments], pairs: Sequence[Pair], group_size: Callable[[int], int], bits: int
) -> None:
    """Scale all pairs of a block by the factors that suit their inputs, the moments along with them."""
    by_name: Mapping[str, Moments] = {name: group for group in moments for name in group.names}
    for pair in pairs:
        group = by_name[pair.names[0]]
        linears: list[Any] = [block.module.get_submodule(name) for name in pair.names]
        weight_OI = torch.cat([linear.weight for linear in linears])
        factors_I = search_factors(weight_OI, group.importance, group_size(weight_OI.shape[1]), bits)
        scale(block.module, pair, factors_I)
        group.scaled(factors_I)
