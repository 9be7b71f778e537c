"""Where the factors of a low-rank change start: pure functions of the base weight and of random draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from slimtune.errors import ConfigError, did_you_mean
from slimtune.methods.lora.originals import Originals

Factors = tuple[Tensor, Tensor]
"""(A, B)."""


class Start(Protocol):
    """What a layer reads of the `LoraConfig` that it is initialised by."""

    init_lora_weights: bool | str
    originals: Originals | None

    @property
    def initialisation(self) -> str: ...


def principal(weight_OI: Tensor, r: int, scaling: float, how: str) -> Factors:
    """Factors (A, B) of a part of the weight: by PiSSA, or by OLoRA, which takes no notice of the scale.

    Args:
        how: "pissa", "pissa_niter_[number]" or "olora".
    """
    if how == "olora":
        return olora(weight_OI, r)
    return pissa(weight_OI, r, scaling, int(how.rpartition("_")[2]) if "niter" in how else None)


def pissa(weight_OI: Tensor, r: int, scaling: float, power_iterations: int | None = None) -> Factors:
    """The greatest r singular values with their vectors, so that s B A is the best approximation of rank r.

    W = U S V^T,  A = sqrt(S_r / s) V_r^T,  B = U_r sqrt(S_r / s)

    Args:
        power_iterations: use a randomised decomposition with so many iterations.

    Meng et al. 2024, arXiv:2404.02948.
    """
    if power_iterations is None:
        u_OK, sigma_K, vt_KI = torch.linalg.svd(_wide(weight_OI), full_matrices=False)
    else:
        u_OK, sigma_K, v_IK = torch.svd_lowrank(_wide(weight_OI), r, niter=power_iterations)
        vt_KI = v_IK.t()
    root_R = (sigma_K[:r] / scaling).sqrt()
    return root_R[:, None] * vt_KI[:r], u_OK[:, :r] * root_R


def olora(weight_OI: Tensor, r: int) -> Factors:
    """The first r directions of W = Q R: A = R_r, B = Q_r. Büyükakyüz 2024, arXiv:2406.01775."""
    q_OK, r_KI = torch.linalg.qr(_wide(weight_OI))
    return r_KI[:r], q_OK[:, :r]


def orthogonal(weight_OI: Tensor, r: int) -> Factors:
    """Random A and B with B A = 0 though neither is zero: they use the even and the odd rows of one rotation."""
    rows, columns = weight_OI.shape
    q_RR, _ = torch.linalg.qr(torch.randn(r, r))
    a_RI = torch.randn(columns, r // 2).mm(q_RR[0::2]).t() / 10
    b_OR = torch.randn(r // 2, rows).t().mm(q_RR[1::2]) / 10
    return a_RI, b_OR


def _wide(weight_OI: Tensor) -> Tensor:
    return weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32))


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
        x_TI = _wide(x_TI)
        mean_I, total = x_TI.mean(0), self.count + len(x_TI)
        rows = [x_TI - mean_I]
        self.variation += float(rows[0].double().square().sum())
        if self.count:
            shift_I = math.sqrt(self.count * len(x_TI) / total) * (self.mean_I - mean_I)
            self.variation += float(shift_I.double().square().sum())
            rows = [self.singular_K[:, None] * self.directions_KI, *rows, shift_I[None]]
            mean_I = self.mean_I + (mean_I - self.mean_I) * (len(x_TI) / total)
        sigma_K, directions_KI = _leading(torch.cat(rows), self.components)
        if self.count:
            self.cosines_K = torch.cosine_similarity(directions_KI, self.directions_KI).abs()
        self.mean_I, self.count, self.singular_K, self.directions_KI = mean_I, total, sigma_K, directions_KI
        self.shares_K = sigma_K.square() / max(self.variation, 1e-30)

    def converged(self, count: int, tau: float) -> bool:
        """Whether the last batch turned none of the first directions by more than a cosine of tau.

        Where the rows vary in fewer directions than were asked for, the rest is rounding, which never converges.
        """
        if not len(self.cosines_K):
            return False
        rounding_K = self.singular_K < 1e-4 * self.singular_K.amax()
        return bool(((self.cosines_K >= tau) | rounding_K)[:count].all())


def _leading(rows_NI: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """The greatest singular values and their right vectors, by random projections that are the same each time."""
    with torch.random.fork_rng(devices=[rows_NI.device] if rows_NI.is_cuda else []):
        torch.manual_seed(42)
        _, sigma, v = torch.svd_lowrank(rows_NI, q=min(2 * components, *rows_NI.shape), niter=4)
    return sigma[:components], v[:, :components].t()


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


@dataclass
class LoftQConfig:
    """How LoftQ quantizes; names and defaults are those of `peft.LoftQConfig`.

    The base is quantized already and stays as it is, so that both fields have but one value here.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def check(self) -> None:
        """Raises: ConfigError, for what would need another base."""
        if self.loftq_bits != 4:
            raise ConfigError(
                f"loftq_bits must be 4, found {self.loftq_bits!r}; the bits are those that the base is loaded in, and "
                "LoftQ is for 4"
            )
        if self.loftq_iter != 1:
            raise ConfigError(
                f"loftq_iter must be 1, found {self.loftq_iter!r}; a second iteration quantizes the base anew, and the "
                "base is frozen here and shared by all adapters; leave loftq_iter out, and choose a higher r to start "
                "nearer to the weights from before quantization"
            )


S = TypeVar("S", EvaConfig, LoftQConfig)


def settings(kind: type[S], given: Mapping[str, Any]) -> S:
    """A start's own settings from a mapping. Raises: ConfigError, for a field that doesn't exist."""
    known = [f.name for f in fields(kind)]
    for name in given:
        if name not in known:
            near = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise ConfigError(f"{kind.__name__} has no field '{name}'{near}")
    return kind(**given)
