"""VeRA: vector-based random matrix adaptation (Kopiczko et al. 2023, arXiv:2310.11454).

y = base(x) + b * (B (d * (A dropout(x)))),  A and B random, frozen and shared by all layers; trained are the vectors
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.core.config import LayeredConfig, register
from slimtune.core.delta import Delta, added, trainable_dtype, wrong_kind
from slimtune.core.frozen import Dense, Frozen, Site
from slimtune.errors import check_choice, check_number, check_whole


@register
@dataclass
class VeraConfig(LayeredConfig):
    """What to adapt with VeRA, and how; names, defaults and meanings are those of `peft.VeraConfig`.

    `projection_prng_key` seeds the shared matrices A (r, largest in) and B (largest out, r), of which each layer uses
    the corner that fits it. `save_projection=False` leaves them out of the file: they are drawn again on loading.

    Raises:
        ConfigError: an unknown field, a value out of range, fields that exclude each other.
    """

    in_peft: ClassVar[bool] = True
    peft_type: str | None = "VERA"
    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    learning_rate: ClassVar[float] = 4e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("r", self.r)
        check_whole("projection_prng_key", self.projection_prng_key, least=0)
        check_number("vera_dropout", self.vera_dropout, 0, 1)
        check_number("d_initial", self.d_initial)
        check_choice("bias", self.bias, ("none", "all", "vera_only"))
        check_choice("init_weights", self.init_weights, (True, False))
        check_choice("save_projection", self.save_projection, (True, False))

    def delta_for(self, site: Site, autocast_adapter_dtype: bool = True) -> VeraLinear:
        """The two vectors for one site, not linked to the shared matrices yet. Raises: TargetError."""
        if site.kind != "linear":
            raise wrong_kind(site, "VeRA", "linear layers")
        delta = VeraLinear(site, self.r, self.vera_dropout, autocast_adapter_dtype)
        if self.bias == "vera_only" and getattr(site.module, "bias", None) is not None:
            delta.hold(site, "bias")
        return delta

    def link_deltas(self, model: Any, drafted: list[tuple[Site, Any]]) -> None:
        """Draw the shared matrices, large enough for the largest layer, and link all layers to them."""
        deltas = [delta for _, delta in drafted if isinstance(delta, VeraLinear)]
        # One pair for all layers, as large as the largest needs; the others read its corner.
        features_in = max(delta.features_in for delta in deltas)
        features_out = max(delta.vera_lambda_b.numel() for delta in deltas)
        projection = Projection(self, features_in, features_out)
        # One copy for each device and dtype that the layers are on; mostly that is one.
        copies: dict[tuple[torch.device, torch.dtype], Projection] = {}
        for delta in deltas:
            place = delta.vera_lambda_b.device, delta.vera_lambda_b.dtype
            if place not in copies:
                copies[place] = (projection if not copies else Projection(self, features_in, features_out)).to(*place)
            delta.projection = copies[place]


class Projection(nn.Module):
    """The matrices A (r, largest in) and B (largest out, r), He-uniform from a seed.

    A module and not two tensors: moving or casting a model keeps what is one module one.
    """

    a: Tensor
    b: Tensor

    def __init__(self, config: VeraConfig, features_in: int, features_out: int) -> None:
        super().__init__()
        # On the CPU in float32 and A before B: the draws of `peft`, wherever the layers are.
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        for name, shape in (("a", (config.r, features_in)), ("b", (features_out, config.r))):
            # He-uniform: gain sqrt(2) by the root of the fan in, and sqrt(3) from a deviation to the bound of a uniform
            # draw.
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
            drawn = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn, persistent=config.save_projection)


class VeraLinear(Delta):
    """y_TO = base(x_TI) + b_O * ((d_R * (x_TI A_RI^T)) B_OR^T).

    Attributes:
        projection: A and B, the same module in all layers.
        vera_dropout: the probability with which an input of A is dropped while training.
    """

    projection: Projection
    on_disk = {
        "projection.a": "/base_model.vera_A",
        "projection.b": "/base_model.vera_B",
        "whole.bias": "base_layer.bias",
    }

    def __init__(self, site: Site, r: int, dropout: float, autocast: bool) -> None:
        super().__init__()
        self.vera_dropout = dropout
        self.features_in, features_out = site.base.features(site.module)
        weight = site.spec
        options: Any = {"device": weight.device, "dtype": trainable_dtype(weight.dtype, autocast)}
        self.vera_lambda_b = nn.Parameter(torch.empty(features_out, **options))
        self.vera_lambda_d = nn.Parameter(torch.empty(r, **options))

    def initialise(self, config: VeraConfig, site: Site) -> None:
        """Set b to zero and d to `d_initial`; without `init_weights` b to one and d to a normal draw."""
        if config.init_weights:
            nn.init.zeros_(self.vera_lambda_b)
            nn.init.constant_(self.vera_lambda_d, config.d_initial)
        else:
            nn.init.ones_(self.vera_lambda_b)
            nn.init.normal_(self.vera_lambda_d)

    @property
    def corners(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r): the parts of the shared matrices that this layer uses."""
        a, b = self.projection.a, self.projection.b
        return a[:, : self.features_in], b[: self.vera_lambda_b.numel()]

    def forward(self, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = base(x, *args, **kwargs)
        a_RI, b_OR = self.corners
        # Plain, in the adapter's dtype; `fused/vera.py` computes the same in the base's.
        x_TI = F.dropout(x.to(a_RI.dtype), self.vera_dropout, self.training)
        z_TR = self.vera_lambda_d * F.linear(x_TI, a_RI)
        return torch.addcmul(y, self.vera_lambda_b, F.linear(z_TR, b_OR)).to(y.dtype)

    def fold(self, dense: Dense) -> Dense:
        a_RI, b_OR = self.corners
        return added(dense, self.vera_lambda_b[:, None] * (b_OR @ (self.vera_lambda_d[:, None] * a_RI)))

    def extra_repr(self) -> str:
        return f"r={self.vera_lambda_d.numel()}, dropout={self.vera_dropout:g}"
