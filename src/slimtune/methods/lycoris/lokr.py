"""LoKr: low-rank Kronecker product (LyCORIS, Yeh et al. 2023, arXiv:2309.14859).

y = base(x) + s * (W1 (x) W2) x,  s = alpha / r: with x read as a matrix X of (c, d), (W1 (x) W2) x = W1 X W2^T
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimtune.core.config import register
from slimtune.core.delta import wrong_kind
from slimtune.core.frozen import Site
from slimtune.errors import ConfigError, check_choice
from slimtune.methods.lycoris.base import LycorisConfig, LycorisDelta, from_core, recomputed


@register
@dataclass
class LoKrConfig(LycorisConfig):
    """What to adapt with LoKr, and how; names, defaults and meanings are those of `peft.LoKrConfig`.

    `decompose_factor` is the size to seek for W1; -1 makes W1 and W2 as near in size as they can be. W2 is a product
    of rank r where that is smaller than W2 itself, and so is W1 with `decompose_both`. `rank_dropout_scale` enlarges
    the outputs that rank dropout keeps. `init_weights="lycoris"` starts with W2 at zero in place of W1.

    Raises:
        ConfigError: an unknown field, a value out of range, fields that exclude each other.
    """

    in_peft: ClassVar[bool] = True
    peft_type: str | None = "LOKR"
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    # A rank above that of a matrix means the matrix itself.
    sizes: ClassVar[tuple[str, ...]] = ()

    initialisations: ClassVar[tuple[bool | str, ...]] = (True, False, "lycoris")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("decompose_both", self.decompose_both, (True, False))
        check_choice("rank_dropout_scale", self.rank_dropout_scale, (True, False))
        factor = self.decompose_factor
        if isinstance(factor, bool) or not isinstance(factor, int) or (factor < 1 and factor != -1):
            raise ConfigError(f"decompose_factor must be a positive whole number, or -1 for any, found {factor!r}")

    def delta_for(self, site: Site, autocast_adapter_dtype: bool = True) -> LokrDelta:
        """The Kronecker product for one site. Raises: TargetError."""
        if site.kind not in ("linear", "conv"):
            raise wrong_kind(site, "LoKr", "linear and convolution layers")
        return (LokrLinear if site.kind == "linear" else LokrConv)(site, self, autocast_adapter_dtype)


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m n = dimension and m <= n as near as can be, m at most `factor`; or m = factor if that divides."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    # `isqrt` and not `sqrt`: a float's root of a large square may come out below it.
    greatest = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    # The largest divisor up to the root: for a prime width that is 1, and W2 is the whole matrix.
    m = next(m for m in range(greatest, 0, -1) if dimension % m == 0)
    return m, dimension // m


class LokrDelta(LycorisDelta):
    """dW = W1_AC (x) W2_BD..., with A B outputs and C D inputs; the kernel of a convolution belongs to W2.

    With `use_effective_conv2d` W2 is sum_ij T_ij... W2a_iB W2b_jD, with a core T for the kernel.
    """

    def __init__(self, site: Site, config: LoKrConfig, autocast: bool) -> None:
        super().__init__(site, config)
        self.rescales_kept = config.rank_dropout_scale
        rows, columns, *kernel = self.shape
        (a, b), (c, d) = (factorization(n, config.decompose_factor) for n in (rows, columns))
        self.small_shape, self.large_shape = (a, c), (b, d, *kernel)
        r = self.r
        whole_1 = not config.decompose_both or r >= max(a, c) / 2
        shapes = {"w1": (a, c)} if whole_1 else {"w1_a": (a, r), "w1_b": (r, c)}
        # Two factors of rank r would hold as many numbers as the matrix, or more; the bound is `peft`'s.
        if r >= max(b, d) / 2:
            shapes |= {"w2": self.large_shape}
        elif self.has_core:
            shapes |= {"w2_a": (r, b), "w2_b": (r, d), "t2": self.core_shape()}
        else:
            shapes |= {"w2_a": (b, r), "w2_b": (r, math.prod(self.large_shape[1:]))}
        self.add_factors(site, autocast, {f"lokr_{name}": shape for name, shape in shapes.items()})

    def initialise(self, config: LoKrConfig, site: Site) -> None:
        """Draw all factors He-uniform; W1 is zero, or W2 in the way of LyCORIS, unless `init_weights` is off."""
        for factor in self.factors:
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}[config.init_weights]
        for name in zero:
            # Which of a pair is there depends on the rank; of two factors one at zero is enough.
            if name in self._parameters:
                nn.init.zeros_(self.get_parameter(name))

    def pair(self, *factors: Tensor) -> tuple[Tensor, Tensor]:
        """(s * W1_AC, W2_BD...)."""
        own = dict(zip(self._parameters, factors, strict=True))
        w1 = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
        if "lokr_w2" in own:
            w2 = own["lokr_w2"]
        elif "lokr_t2" in own:
            w2 = from_core(own["lokr_t2"], own["lokr_w2_a"], own["lokr_w2_b"])
        else:
            w2 = own["lokr_w2_a"] @ own["lokr_w2_b"]
        return self.scaling * w1, w2.reshape(self.large_shape)

    @property
    def is_misaligned(self) -> bool:
        """Whether dW is `peft`'s product of a 2-D W1 and a 3-D W2, which lines up their last axes.

        That is no Kronecker product of channels; but it is what such an adapter on disk was trained as.
        """
        return len(self.large_shape) == 3 and "lokr_w2" in self._parameters

    def update(self, *factors: Tensor) -> Tensor:
        w1, w2 = self.pair(*factors)
        # W1 has no kernel: ones for its axes, so that `kron` multiplies channels by channels.
        aligned = w1 if self.is_misaligned else w1.view(*w1.shape, *[1] * (w2.ndim - 2))
        return torch.kron(aligned, w2.contiguous()).reshape(self.shape)


class LokrLinear(LokrDelta):
    """y = base(x) + s * W1_AC X_CD W2_BD^T, flattened; the product of W1 and W2 is never made."""

    def change(self, module: Any, x: Tensor) -> Tensor:
        def multiplied(x: Tensor, *factors: Tensor) -> Tensor:
            return self.multiplied(x.to(factors[0].dtype), *factors)

        return recomputed(multiplied, x, *self.factors)

    def multiplied(self, x: Tensor, *factors: Tensor) -> Tensor:
        """s * W1 X W2^T in the precision of x."""
        w1_AC, w2_BD = (matrix.to(x.dtype) for matrix in self.pair(*factors))
        (a, c), (b, d) = w1_AC.shape, w2_BD.shape
        # x_I read as X_CD: (W1 (x) W2) x is W1 X W2^T, of the shape (A, B), flattened.
        x_TCD, shape = x.reshape(-1, c, d), (*x.shape[:-1], a * b)
        # Both orders give the same; the one with fewer multiplications.
        if c * b * (d + a) <= d * a * (c + b):
            return (w1_AC @ (x_TCD @ w2_BD.t())).reshape(shape)
        return ((w1_AC @ x_TCD) @ w2_BD.t()).reshape(shape)


class LokrConv(LokrDelta):
    """W2 as a convolution of each of C groups of D channels, whose results W1 mixes."""

    def change(self, module: Any, x: Tensor) -> Tensor:
        def convolved(x: Tensor, *factors: Tensor) -> Tensor:
            return self.convolved(module, x, *factors)

        return recomputed(convolved, x, *self.factors)

    def convolved(self, module: Any, x: Tensor, *factors: Tensor) -> Tensor:
        x = x.to(factors[0].dtype)
        # With groups the channels of a group aren't the D that W2 reads: only the whole update is right.
        if module.groups > 1 or self.is_misaligned:
            return module._conv_forward(x, self.update(*factors), None)
        w1_AC, w2 = self.pair(*factors)
        (a, c), (b, d, *kernel) = w1_AC.shape, w2.shape
        batch, size = x.shape[: -len(kernel) - 1], x.shape[-len(kernel) :]
        # C becomes part of the batch: (N, C * D, ...) as (N * C, D, ...), each through the convolution with W2.
        # The module's own, for its stride, padding and padding mode; W1 has no part in where the kernel stands.
        z = module._conv_forward(x.reshape(-1, d, *size), w2, None)
        y_NAS = w1_AC @ z.reshape(-1, c, b * math.prod(z.shape[2:]))
        return y_NAS.reshape(*batch, a * b, *z.shape[2:])
