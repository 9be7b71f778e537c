"""What EVA starts from: its settings, and the principal directions of rows that come batch by batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from slimtune.errors import ConfigError
from slimtune.methods.lora.init import wide


@dataclass
class EvaConfig:
    """How EVA finds and shares out the ranks; names, defaults and meanings are those of `peft.EvaConfig`.

    Args:
        rho: a module gets at most rho * r ranks; 1 leaves all ranks as they are.
        tau: a direction has converged when its cosine with the one before is at least this.
        use_label_mask, label_mask_value: leave out the tokens whose label is this value.
        whiten: divide each direction by the root of its singular value.
        adjust_scaling_factors: give a module with another rank the alpha that keeps its scale.

    Raises:
        ConfigError: a value out of range.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise ConfigError(f"rho must be at least 1, found {self.rho!r}")
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"tau must lie in [0, 1], found {self.tau!r}")


class IncrementalPCA:
    """Principal directions of rows that come batch by batch, after Ross et al. 2008.

    Attributes:
        directions_KI: the directions found so far, by falling share.
        singular_K: their singular values.
        shares_K: the shares of the rows' variance that they explain.
        cosines_K: of each direction with the one in its place before the last batch.
    """

    def __init__(self, components: int) -> None:
        self.components = components
        self.count = 0
        self.variation = 0.0
        self.mean_I = self.directions_KI = self.singular_K = self.shares_K = self.cosines_K = torch.empty(0)

    def update(self, x_TI: Tensor) -> None:
        """Take a batch of at least `components` rows in."""
        x_TI = wide(x_TI)
        mean_I, total = x_TI.mean(0), self.count + len(x_TI)
        # The decomposition of [S V^T so far; new rows, centred; shift of the mean] has the directions of all rows
        # together: (K + tokens + 1, in) numbers a batch and none of the batches before.
        rows = [x_TI - mean_I]
        # In float64: the sum runs over all tokens of the data, and float32 stops growing at about 2^24 times a summand.
        self.variation += float(rows[0].double().square().sum())
        if self.count:
            shift_I = math.sqrt(self.count * len(x_TI) / total) * (self.mean_I - mean_I)
            self.variation += float(shift_I.double().square().sum())
            rows = [self.singular_K[:, None] * self.directions_KI, *rows, shift_I[None]]
            mean_I = self.mean_I + (mean_I - self.mean_I) * (len(x_TI) / total)
        sigma_K, directions_KI = _leading(torch.cat(rows), self.components)
        if self.count:
            # Without a sign: a singular vector is defined up to one.
            self.cosines_K = torch.cosine_similarity(directions_KI, self.directions_KI).abs()
        self.mean_I, self.count, self.singular_K, self.directions_KI = mean_I, total, sigma_K, directions_KI
        # Of all the variation there is, that outside of the K directions included.
        self.shares_K = sigma_K.square() / max(self.variation, 1e-30)

    def converged(self, count: int, tau: float) -> bool:
        """Whether the last batch turned none of the first directions by more than a cosine of tau.

        Where the rows vary in fewer directions than were asked for, the rest is rounding, which never converges.
        """
        if not len(self.cosines_K):
            return False
        # Some thousand times float32's 1.2e-7: what the random projection leaves in directions that don't exist.
        rounding_K = self.singular_K < 1e-4 * self.singular_K.amax()
        return bool(((self.cosines_K >= tau) | rounding_K)[:count].all())


def _leading(rows_NI: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """The greatest singular values and their right vectors, by random projections that are the same each time."""
    with torch.random.fork_rng(devices=[rows_NI.device] if rows_NI.is_cuda else []):
        # The same projections each time, so that equal data give equal ranks; the caller's random numbers go on as
        # before.
        torch.manual_seed(42)
        # Twice as many as are wanted and four power iterations: the trailing directions of a randomised SVD are the
        # inexact ones, and they are cut off.
        _, sigma, v = torch.svd_lowrank(rows_NI, q=min(2 * components, *rows_NI.shape), niter=4)
    return sigma[:components], v[:, :components].t()
