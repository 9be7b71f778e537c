"""LoHa: low-rank Hadamard product (Hyeon-Woo et al. 2021, arXiv:2108.06098; LyCORIS, arXiv:2309.14859).

y = base(x) + s * ((W1a W1b) * (W2a W2b)) x,  s = alpha / r: of rank r^2 with the parameters of rank 2r
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from slimtune.core.config import register
from slimtune.core.delta import RowParts, wrong_kind
from slimtune.core.frozen import Frozen, Site
from slimtune.methods.lycoris.base import LycorisConfig, LycorisDelta, from_core, recomputed, updated_product


@register
@dataclass
class LoHaConfig(LycorisConfig):
    """What to adapt with LoHa, and how; names, defaults and meanings are those of `peft.LoHaConfig`.

    Raises:
        ConfigError: an unknown field, a value out of range, fields that exclude each other.
    """

    in_peft: ClassVar[bool] = True
    peft_type: str | None = "LOHA"

    def delta_for(self, site: Site, autocast_adapter_dtype: bool = True) -> LohaDelta:
        """The Hadamard product for one site. Raises: TargetError."""
        if site.kind not in ("linear", "conv"):
            raise wrong_kind(site, "LoHa", "linear and convolution layers")
        return (LohaLinear if site.kind == "linear" else LohaConv)(site, self, autocast_adapter_dtype)


class LohaDelta(LycorisDelta):
    """dW_OI = (W1a_OR W1b_RI) * (W2a_OR W2b_RI), the kernel of a convolution counted among the inputs.

    With `use_effective_conv2d` each of the two is sum_ij T_ij... Wa_iO Wb_jI, with a core T for the kernel.
    """

    def __init__(self, site: Site, config: LycorisConfig, autocast: bool) -> None:
        super().__init__(site, config)
        rows, *columns = self.shape
        for i in (1, 2):
            if self.has_core:
                shapes = {"w{}_a": (self.r, rows), "w{}_b": (self.r, columns[0]), "t{}": self.core_shape()}
            else:
                shapes = {"w{}_a": (rows, self.r), "w{}_b": (self.r, math.prod(columns))}
            self.add_factors(site, autocast, {"hada_" + name.format(i): shape for name, shape in shapes.items()})

    def initialise(self, config: LycorisConfig, site: Site) -> None:
        """Draw all factors He-uniform; W2b is zero, and the update with it, unless `init_weights` is off."""
        for factor in self.factors:
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        if config.init_weights:
            # One of four is enough, and only this one has a gradient at first: all others are multiplied by it.
            nn.init.zeros_(self.get_parameter("hada_w2_b"))

    def update(self, *factors: Tensor) -> Tensor:
        half = len(factors) // 2
        # s times an (out, r) factor, and not times the (out, in) product.
        factors = (factors[0] * self.scaling, *factors[1:])
        one, two = (_product(*factors[i : i + half]) for i in (0, half))
        return (one * two).view(self.shape)


def _product(a: Tensor, b: Tensor, core: Tensor | None = None) -> Tensor:
    return a @ b if core is None else from_core(core, a, b)


class LohaLinear(LohaDelta):
    """y_TO = base(x_TI) + s * x_TI dW_OI^T."""

    def row_parts(self, base: Frozen) -> RowParts | None:
        # A product of sums is the sum of all products: rank r^2, and dW itself is never made.
        a1_OR, b1_RI, a2_OR, b2_RI = self.factors
        b_ORR = self.scaling * a1_OR[:, :, None] * a2_OR[:, None, :]
        return RowParts((b1_RI[:, None] * b2_RI[None]).flatten(0, 1), b_ORR.flatten(1))

    def change(self, module: Any, x: Tensor) -> Tensor:
        return updated_product(self.update, x, None, None, *self.factors)


class LohaConv(LohaDelta):
    """The convolution of the base with s * dW in place of its weight."""

    def change(self, module: Any, x: Tensor) -> Tensor:
        # A convolution has no cheaper form: dW is made whole, and again in backward.
        weight = recomputed(self.update, *self.factors)
        return module._conv_forward(x.to(weight.dtype), weight, None)
