"""DoRA: LoRA that trains the magnitude and the direction of each output's weights apart; `LoraConfig(use_dora=True)`.

W' = m * (W + s B A) / n,  n = ||W + s B A|| by rows, taken as a constant; m starts as ||W||

y = base(x) + (c - 1) * (base(x) - b) + c * s * B(A(x)),  c = m / n

With dropout, A and the second base(x) read dropout(x). Liu et al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.delta import Dense, Frozen, Site
from slimtune.errors import ConfigError
from slimtune.methods.lora import LoraConfig, LoraConv, LoraDelta, LoraEmbedding, LoraLinear


class DoraDelta(LoraDelta):
    """What the kinds share.

    Attributes:
        lora_magnitude_vector: m, (out,), for convolutions (1, out, 1, ...) as `peft` stores it.
    """

    def __init__(self, site: Site, r: int, scaling: float, dropout: float, autocast: bool) -> None:
        super().__init__(site, r, scaling, dropout, autocast)
        shape = self.magnitude_shape(site)
        self.lora_magnitude_vector = nn.Parameter(self.trained[0].new_empty(shape))
        self._squares: tuple[Any, Any, Tensor] | None = None

    @staticmethod
    def magnitude_shape(site: Site) -> tuple[int, ...]:
        return (site.base.features(site.module)[1],)

    def initialise(self, config: LoraConfig, site: Site) -> None:
        """Set A and B as LoRA does, and m to the norms, so that c is one."""
        super().initialise(config, site)
        weight = site.base.weight(site.module).detach()
        if weight.is_meta:
            raise ConfigError(f"DoRA reads the weight of '{site.name}' to start, and it is offloaded")
        squares_O = _squares(weight)
        norms = self.norms(weight, squares_O) if self.pair[1].any() else squares_O.sqrt()
        with torch.no_grad():
            self.lora_magnitude_vector.copy_(norms.view_as(self.lora_magnitude_vector))

    def forward(self, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y, bias, ratio = base(x, *args, **kwargs), base.bias, self.ratio(base)
        kept = self.dropped(x)
        dropping = self.training and self.lora_dropout and x.is_floating_point()
        straight = base(kept.to(x.dtype), *args, **kwargs) if dropping else y
        if bias is not None:
            straight = straight - bias.view_as(ratio)
        return (y + (ratio - 1) * straight + ratio * self.scaling * self.low_rank(kept)).to(y.dtype)

    def ratio(self, base: Frozen) -> Tensor:
        """c = m / n, shaped to be multiplied with an output."""
        magnitude = self.lora_magnitude_vector
        return quotient(magnitude.flatten(), self.norms_now(base)).view(self.out_shape)

    @property
    def out_shape(self) -> torch.Size:
        """The shape in which one number for each output is multiplied with an output."""
        shape = self.lora_magnitude_vector.shape
        return shape[1:] if len(shape) > 1 else shape

    def norms_now(self, base: Frozen) -> Tensor:
        """n_O in the dtype of m; a constant, so that a weight that was written over is another one."""
        return self.norms(base.weight.detach(), self._square_norms(base)).to(self.lora_magnitude_vector.dtype)

    @torch.no_grad()
    def norms(self, weight: Tensor, squares_O: Tensor) -> Tensor:
        """n_O = ||W + s B A|| by rows, from ||W||^2 by rows and without the product B A:

        n^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>
        """
        weight_OI = weight.flatten(1)
        with torch.autocast(weight.device.type, enabled=False):
            a_RI, b_OR = (factor.flatten(1).to(squares_O.dtype) for factor in self.pair)
            cross_OR = (weight_OI @ a_RI.t().to(weight.dtype)).to(squares_O.dtype)
            own_OR = b_OR @ (a_RI @ a_RI.t())
            change_O = ((2 * cross_OR).add_(own_OR, alpha=self.scaling) * b_OR).sum(1)
        return (squares_O + self.scaling * change_O).clamp_min_(0).sqrt_()

    def _square_norms(self, base: Frozen) -> Tensor:
        """||W||^2 by rows; computed again only if the weight is no more what it was."""
        owner = getattr(base.module, "weight", None)
        # The compiler can't trace what is asked after it.
        if torch.compiler.is_compiling() or not isinstance(owner, Tensor) or owner.is_inference():
            return _squares(base.weight.detach())
        state = (owner._version, owner.untyped_storage()._cdata, owner.device, owner.dtype)
        if self._squares is None or self._squares[0]() is not owner or self._squares[1] != state:
            self._squares = (weakref.ref(owner), state, _squares(base.weight.detach()))
        return self._squares[2]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_squares": None}

    def fold(self, dense: Dense) -> Dense:
        return self.fold_beside(dense, dense)

    def fold_beside(self, dense: Dense, frozen: Dense) -> Dense:
        """c (W + s B A); the norm is that of the frozen weight, as in the forward."""
        own = frozen["weight"]
        norms = self.norms(own, _squares(own))
        magnitude = self.lora_magnitude_vector.detach().flatten().to(norms.dtype)
        ratio = quotient(magnitude, norms).view(-1, *[1] * (own.ndim - 1))
        weight = dense["weight"]
        folded = weight.to(norms.dtype).add(self.product(), alpha=self.scaling).mul_(ratio)
        return dense | {"weight": folded.to(weight.dtype)}


def quotient(magnitude_O: Tensor, norms_O: Tensor) -> Tensor:
    """m / n; a row of zeros has no direction to scale: one."""
    zero_O = norms_O == 0
    return torch.where(zero_O, 1.0, magnitude_O / norms_O.masked_fill(zero_O, 1.0))


def _squares(weight: Tensor) -> Tensor:
    """||W||^2 by rows, in float32 at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight.flatten(1), dim=1, dtype=dtype).square_()


class DoraLinear(DoraDelta, LoraLinear):
    """y_TO = base(x_TI) + (c_O - 1) * (base(x_TI) - b_O) + c_O * s * (x_TI A_RI^T) B_OR^T."""


class DoraConv(DoraDelta, LoraConv):
    """One magnitude for each output channel; the norm runs over its whole kernel."""

    def __init__(self, site: Site, r: int, scaling: float, dropout: float, autocast: bool) -> None:
        if site.module.groups > 1:
            raise ConfigError(
                f"DoRA can't take the norm of the update of '{site.name}', a grouped convolution, as the update isn't "
                "grouped; leave it out of target_modules"
            )
        super().__init__(site, r, scaling, dropout, autocast)

    @staticmethod
    def magnitude_shape(site: Site) -> tuple[int, ...]:
        return (1, site.module.out_channels, *[1] * len(site.module.kernel_size))


class DoraEmbedding(DoraDelta, LoraEmbedding):
    """One magnitude for each feature, over all rows of the table."""


KINDS: dict[str, type[LoraDelta]] = {"linear": DoraLinear, "conv": DoraConv, "embedding": DoraEmbedding}
