"""Weighted combinations of LoRA adapters on one layer: D = sum_i w_i s_i B_i A_i.

cat              A and B of all adapters side by side: D exactly, of the sum of the ranks
linear           factor by factor: sums of the A_i and of the B_i, each with the root of its weight; not D itself
svd              the best approximation of D of a lower rank
magnitude_prune  as linear, of each A_i and B_i only the share `density` of the largest entries
dare_linear      as linear, each entry kept with the chance `density` and divided by it (Yu et al. 2023,
                 arXiv:2311.03099)
ties             pruned as magnitude_prune; per entry, the mean of those adapters that have the sign of the majority
                 (Yadav et al. 2023, arXiv:2306.01708)
dare_ties        kept as dare_linear, joined as ties

With `_svd` behind it, each of the last four acts on the updates s_i B_i A_i, whose combination is then cut to a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slimtune.errors import ConfigError, did_you_mean

Factors = tuple[Tensor, Tensor]
"""(A, B), (r, in, ...) and (out, r, ...)."""

SPARSE = ("magnitude_prune", "dare_linear", "dare_ties", "ties")
NAMES = ("linear", "svd", "cat", *SPARSE, *(f"{name}_svd" for name in SPARSE))
SIGNS = ("total", "frequency")


def combined(
    deltas: Sequence[Any],
    weights: Sequence[float],
    how: str,
    rank: int,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> Factors:
    """A and B of the combination, to be used with the scale 1.

    Args:
        rank: that of the result, where it is cut by "svd".
        svd_clamp: the quantile of the factors' entries at which they are clamped, after a cut by "svd".
        svd_full_matrices: taken as in `peft`; vectors beyond the rank are cut off either way.
        svd_driver: which of CUDA's algorithms takes the singular values.
        density: the share of entries that is kept, in (0, 1].
        majority_sign_method: whether the sum of entries ("total") or the count of signs ("frequency") decides.

    Raises:
        ConfigError: an unknown way, or options that don't go with it.
    """
    if how not in NAMES:
        raise ConfigError(
            f"combination_type must be one of {', '.join(NAMES)}, found {how!r}{did_you_mean(how, NAMES)}"
        )
    name = how.removesuffix("_svd")
    mix = mixture(name, density, majority_sign_method)
    scales = [weight * delta.scaling for weight, delta in zip(weights, deltas, strict=True)]
    pairs = [tuple(factor.detach() for factor in delta.pair) for delta in deltas]
    if how == "cat":
        # (sum of r_i, in): the weights and scales go into A, so that B is stacked as it is.
        a = torch.cat([scale * a for scale, (a, _) in zip(scales, pairs, strict=True)], dim=0)
        return a, torch.cat([b for _, b in pairs], dim=1)
    if how.endswith("svd"):
        # (out, in) each, all adapters' at once: the sparse ways look at the entries of whole updates.
        updates = [delta.scaling * delta.product().flatten(1) for delta in deltas]
        return _cut(mix(updates, weights), rank, svd_clamp, svd_driver)
    ranks = {len(a) for a, _ in pairs}
    if len(ranks) > 1:
        raise ConfigError(f"combination_type {how!r} needs equal ranks, found {sorted(ranks)}; use 'cat' or 'svd'")
    # sqrt|w s| in each factor and the sign in A. The sum of products is not the product of sums: the terms B_i A_j
    # between adapters are in it, which is what "linear" is in `peft`, too.
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    return mix([a for a, _ in pairs], signed), mix([b for _, b in pairs], roots)


def _cut(update: Tensor, rank: int, clamp: float | None, driver: str | None) -> Factors:
    """The factors of the best approximation of an (out, in) update in float32."""
    # The thin form: u (out, k), v (k, in) with k = min(out, in); with full matrices u alone would be (out, out).
    u, sigma, v = torch.linalg.svd(update, full_matrices=False, driver=driver)
    b, a = u[:, :rank] * sigma[:rank], v[:rank]  # sigma goes into B, as in `peft`
    if clamp is not None:
        # One bound for all entries of both factors.
        bound = float(torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp))
        a, b = a.clamp(-bound, bound), b.clamp(-bound, bound)
    return a, b


def mixture(name: str, density: float | None, sign: str) -> Callable[[Sequence[Tensor], Sequence[float]], Tensor]:
    """The function that makes one tensor of several of the same shape, each with its weight. Raises: ConfigError."""
    if name not in SPARSE:
        if density is not None:
            raise ConfigError(f"combination_type {name!r} keeps every entry and takes no density, found {density!r}")
        return _sum
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ConfigError(f"combination_type {name!r} needs density, a share in (0, 1], found {density!r}")
    if sign not in SIGNS:
        raise ConfigError(f"majority_sign_method must be total or frequency, found {sign!r}{did_you_mean(sign, SIGNS)}")
    thin = _at_random if name.startswith("dare") else _largest

    def mix(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        kept = [tensor if density == 1 else thin(tensor, density) for tensor in tensors]
        return _of_the_majority(kept, weights, sign) if name.endswith("ties") else _sum(kept, weights)

    return mix


def _sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([weight * tensor for weight, tensor in zip(weights, tensors, strict=True)]).sum(0)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """The tensor with zeros for all but the share of its largest entries."""
    flat = tensor.flatten()
    # topk and not a threshold: of equal entries as many are kept as asked for, not all or none.
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(tensor)


def _at_random(tensor: Tensor, density: float) -> Tensor:
    """Each entry with a chance, divided by it, so that the mean stays."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def _of_the_majority(tensors: Sequence[Tensor], weights: Sequence[float], sign: str) -> Tensor:
    """Per entry, the mean of the weighted tensors that have the sign of the majority of the unweighted."""
    stacked = torch.stack(list(tensors))
    # Elect the sign by the unweighted sums; the weights come in below. That is `peft`'s order.
    majority = (stacked if sign == "total" else stacked.sign()).sum(0)
    # An entry that was pruned has the sign 0 and agrees with neither, so that it doesn't count in the mean.
    agrees = stacked.sign() == torch.where(majority >= 0, 1.0, -1.0)
    weighted = torch.stack([weight * tensor for weight, tensor in zip(weights, tensors, strict=True)])
    # Where all were pruned the numerator is 0, too: 0 / 1.
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)
