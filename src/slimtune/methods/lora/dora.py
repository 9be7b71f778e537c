"""DoRA: LoRA that trains the magnitude and the direction of each output's weights apart; `LoraConfig(use_dora=True)`.

W' = m * (W + s B A) / n,  n = ||W + s B A|| by rows, taken as a constant; m starts as ||W||

y = base(x) + (c - 1) * (base(x) - b) + c * s * B(A(x)),  c = m / n

Without a bias that is c * (base(x) + s * B(A(x))). With dropout, A and the second base(x) read dropout(x). Liu et al.
2024, arXiv:2402.09353.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from slimtune.core.delta import RowParts
from slimtune.core.frozen import Dense, Frozen, Site
from slimtune.errors import ConfigError
from slimtune.methods.lora.layers import LoraConv, LoraDelta, LoraEmbedding, LoraLinear, Start
from slimtune.ops.autograd import is_traced, no_autocast


class DoraDelta(LoraDelta):
    """What the kinds share.

    Attributes:
        lora_magnitude_vector: m, (out,), for convolutions (1, out, 1, ...) as `peft` stores it.
    """

    def __init__(self, site: Site, r: int, scaling: float, dropout: float, autocast: bool) -> None:
        super().__init__(site, r, scaling, dropout, autocast)
        shape = self.magnitude_shape(site)
        self.lora_magnitude_vector = nn.Parameter(self.trained[0].new_empty(shape))
        self._squares, self._ratio = Remembered(), Remembered()

    @staticmethod
    def magnitude_shape(site: Site) -> tuple[int, ...]:
        return (site.base.features(site.module)[1],)

    def initialise(self, config: Start, site: Site) -> None:
        """Set A and B as LoRA does, and m to the norms, so that c is one."""
        super().initialise(config, site)
        weight = _weight_at(site)
        squares_O = _squares(weight)
        # B is zero in most starts: then n = ||W||, without a product with the (out, in) weight.
        norms = self.norms(weight, squares_O) if self.pair[1].any() else squares_O.sqrt()
        with torch.no_grad():
            self.lora_magnitude_vector.copy_(norms.view_as(self.lora_magnitude_vector))

    def forward(self, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y, bias, ratio = base(x, *args, **kwargs), base.bias, self.ratio(base)
        kept = self.dropped(x)
        dropping = self.training and self.lora_dropout and x.is_floating_point()
        if bias is None and not dropping:
            # One product with c where nothing tells the base's two parts apart.
            return (ratio * (y + self.scaling * self.low_rank(kept))).to(y.dtype)
        # `peft` has it so: m scales what the base makes of dropout(x), the same input that A reads.
        straight = base(kept.to(x.dtype), *args, **kwargs) if dropping else y
        if bias is not None:
            straight = straight - bias.view_as(ratio)
        return (y + (ratio - 1) * straight + ratio * self.scaling * self.low_rank(kept)).to(y.dtype)

    @property
    def learns(self) -> bool:
        """Whether gradients of this delta may be asked for, now or when a checkpointed layer is computed again."""
        own = self.parameters(recurse=False)
        return self.training or (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in own))

    def ratio(self, base: Frozen) -> Tensor:
        """c = m / n, shaped to be multiplied with an output."""
        if not self.learns:
            return self.ratio_at_rest(base).view(self.out_shape)
        magnitude = self.lora_magnitude_vector
        return quotient(magnitude.flatten(), self.norms_now(base)).view(self.out_shape)

    @torch.no_grad()
    def ratio_at_rest(self, base: Frozen) -> Tensor:
        """c_O where nothing is learned: kept, so that a step of decoding doesn't read the whole weight for it."""

        def compute() -> Tensor:
            return quotient(self.lora_magnitude_vector.flatten(), self.norms_now(base))

        own = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        return self._ratio.get([*_weights(base), *own] if _weights(base) else [], self.scaling, compute)

    def train(self, mode: bool = True) -> Self:
        """As the module's own; what is written through `.data` leaves no trace, so that c is forgotten here."""
        self._ratio.forget()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._ratio.forget()
        return super()._apply(fn, recurse)

    @property
    def out_shape(self) -> torch.Size:
        """The shape in which one number for each output is multiplied with an output."""
        shape = self.lora_magnitude_vector.shape
        return shape[1:] if len(shape) > 1 else shape

    def norms_now(self, base: Frozen) -> Tensor:
        """n_O in the dtype of m; a constant, so that a weight that was written over is another one."""
        weight = base.weight.detach()
        if not self.learns:
            return self.norms(weight, _squares(weight)).to(self.lora_magnitude_vector.dtype)
        # Training changes the factors at every step: what was kept of the last answer is stale.
        self._ratio.forget()
        squares_O = self._squares.get(_weights(base), None, lambda: _squares(weight))
        return self.norms(weight, squares_O).to(self.lora_magnitude_vector.dtype)

    @torch.no_grad()
    def norms(self, weight: Tensor, squares_O: Tensor) -> Tensor:
        """n_O = ||W + s B A|| by rows, from ||W||^2 by rows and without the product B A:

        n^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>
        """
        with no_autocast(weight.device.type):
            a_RI, b_OR = (factor.flatten(1).to(squares_O.dtype) for factor in self.pair)
            a_IR = a_RI.t()
            # (out, in) by (in, r) in the base's dtype: W in float32 would be a copy of twice its size, each step.
            # `peft` forms B A, (out, in), and the norm of the sum.
            cross_OR = (weight.flatten(1) @ a_IR.to(weight.dtype)).to(squares_O.dtype)
            change_OR = torch.addmm(cross_OR, b_OR, a_RI @ a_IR, beta=2, alpha=self.scaling)
            change_O = torch.linalg.vecdot(change_OR, b_OR)
        # Three terms that nearly cancel, where W + s B A is near zero, can come out below it.
        return torch.add(squares_O, change_O, alpha=self.scaling).clamp_min_(0).sqrt_()

    @classmethod
    def combine(
        cls, deltas: list[Any], weights: list[float], how: str, target: Any, site: Site, **options: Any
    ) -> None:
        """Set A and B of `target` as for LoRA, and m = ||W|| + sum_i w_i (m_i - ||W||)."""
        super().combine(deltas, weights, how, target, site, **options)
        with torch.no_grad():
            magnitude = target.lora_magnitude_vector
            start = _squares(_weight_at(site)).sqrt().view_as(magnitude)
            # m starts as ||W||: what an adapter learned of it is its difference to that, and differences add up.
            changes = [w * (delta.lora_magnitude_vector - start) for w, delta in zip(weights, deltas, strict=True)]
            magnitude.copy_(start + torch.stack(changes).sum(0))

    def fold(self, dense: Dense) -> Dense:
        return self.fold_beside(dense, dense)

    def fold_beside(self, dense: Dense, frozen: Dense) -> Dense:
        """c (W + s B A); the norm is that of the frozen weight, as in the forward."""
        own = frozen["weight"]
        # c is of the base alone: other adapters may be in `dense` by now, and the forward's norm doesn't see them
        # either.
        norms = self.norms(own, _squares(own))
        magnitude = self.lora_magnitude_vector.flatten().to(norms.dtype)
        ratio = quotient(magnitude, norms).view(-1, *[1] * (own.ndim - 1))
        weight = dense["weight"]
        folded = weight.to(norms.dtype).add(self.product(), alpha=self.scaling).mul_(ratio)
        return dense | {"weight": folded.to(weight.dtype)}


class Remembered:
    """A tensor that is kept for as long as those that it was computed from are the very same, unchanged."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._sources: tuple[Any, ...] = ()
        self._state: Any = None
        self._value: Tensor | None = None

    def get(self, sources: Sequence[Tensor], setting: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """The tensor, computed anew where a source or the setting has changed, or where that can't be told."""
        # What was made in inference mode changes without a trace; the compiler can't trace what is asked after it.
        if not sources or is_traced() or any(source.is_inference() for source in sources):
            return compute()
        # The version counts writes in place; the storage tells of `t.data = other`, which leaves the version as it was.
        state = setting, [(t._version, _storage(t), t.device, t.dtype) for t in sources]
        is_same = state == self._state and all(kept() is t for kept, t in zip(self._sources, sources, strict=True))
        if self._value is None or not is_same:
            # Weakly: a weight that is taken out of the model must not live on here.
            self._sources, self._state = tuple(weakref.ref(source) for source in sources), state
            self._value = compute()
        return self._value

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a module starts with nothing: what was remembered is about the tensors of the other one.
        return Remembered, ()


def _storage(tensor: Tensor) -> int | None:
    """What tells a tensor's memory from any other; None of one in a layout that nobody can write to."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None


def _weight_at(site: Site) -> Tensor:
    """The frozen weight (out, in, ...). Raises: ConfigError, where it isn't there."""
    weight = site.base.weight(site.module).detach()
    if weight.is_meta:
        raise ConfigError(f"DoRA reads the weight of '{site.name}' to start, and it is offloaded")
    return weight


def _weights(base: Frozen) -> list[Tensor]:
    """What the frozen weight is kept in."""
    # The parameter itself: what a property of that name gives may be another tensor each time.
    weight = base.module._parameters.get("weight")
    return base.base.held(base.module) if weight is None else [weight]


def quotient(magnitude_O: Tensor, norms_O: Tensor) -> Tensor:
    """m / n; a row of zeros has no direction to scale: one."""
    zero_O = norms_O == 0
    return torch.where(zero_O, 1.0, magnitude_O / norms_O.masked_fill(zero_O, 1.0))


def _squares(weight: Tensor) -> Tensor:
    """||W||^2 by rows, in float32 at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    # By `dtype=`, which converts while it reads, without a float32 copy of W. In 16 bits the sum would stop growing.
    return torch.linalg.vector_norm(weight.flatten(1), dim=1, dtype=dtype).square_()


class DoraLinear(DoraDelta, LoraLinear):
    """y_TO = base(x_TI) + (c_O - 1) * (base(x_TI) - b_O) + c_O * s * (x_TI A_RI^T) B_OR^T."""

    def row_parts(self, base: Frozen) -> RowParts | None:
        a_RI, b_OR = self.pair
        ratio_O = self.ratio_at_rest(base)
        # The base's bias stays as it is, though the output is scaled with it; B's own is behind c, as B is.
        bias_O = None if base.bias is None else (1 - ratio_O) * base.bias
        if self.lora_bias is not None:
            own_O = ratio_O * self.scaling * self.lora_bias
            bias_O = own_O if bias_O is None else bias_O + own_O
        return RowParts(a_RI, self.scaling * b_OR, output=ratio_O, bias=bias_O)


class DoraConv(DoraDelta, LoraConv):
    """One magnitude for each output channel; the norm runs over its whole kernel."""

    @torch.no_grad()
    def norms(self, weight: Tensor, squares_O: Tensor) -> Tensor:
        if self.groups == 1:
            return super().norms(weight, squares_O)
        # The update reads all input channels and the weight those of its group, so that they have no sum. `peft` lays
        # g rows of B (out, r / g) side by side, multiplies, and cuts each row of the product into g rows: files that
        # it trained mean this norm. At the start, with B zero, it is ||W||.
        a, b = (factor.to(squares_O.dtype) for factor in self.pair)
        laid_out = b.reshape(-1, self.r) @ a.reshape(self.r, -1)
        changed = torch.add(weight.to(squares_O.dtype), laid_out.view_as(weight), alpha=self.scaling)
        return changed.flatten(1).norm(dim=1)

    @staticmethod
    def magnitude_shape(site: Site) -> tuple[int, ...]:
        return (1, site.module.out_channels, *[1] * len(site.module.kernel_size))


class DoraEmbedding(DoraDelta, LoraEmbedding):
    """One magnitude for each feature, over all rows of the table."""


KINDS: dict[str, type[LoraDelta]] = {"linear": DoraLinear, "conv": DoraConv, "embedding": DoraEmbedding}
