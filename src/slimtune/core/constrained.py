"""A constraint on the merged weight: c(fold(W, delta)) is what is trained, so that merging it loses nothing.

    y = x c(fold(W))^T + b

    Mask   c(W') = W' where W is not 0, and 0 where it is: what was pruned stays pruned
    Grid   c(W') = s round(W' / s), clipped to the codes: what is trained is what is stored in few bits

The gradient of rounding is taken for 1 (straight through; Bengio et al. 2013, arXiv:1308.3432), and that of the scale
s, where it is learned, is that of LSQ (Esser et al. 2020, arXiv:1902.08153). A method knows of none of this: all that
is asked of it is its `fold`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slimtune.core.delta import Delta
from slimtune.core.frozen import Base, Dense, Frozen, Site
from slimtune.errors import BaseMismatchError
from slimtune.ops import grid
from slimtune.ops.autograd import is_traced
from slimtune.ops.rebuilt_linear import rebuilt_linear, straight_linear
from slimtune.storage.peft_format import key


class Constraint(nn.Module):
    """What a folded weight is held to."""

    def initialise(self, site: Site) -> None:
        """Set what is kept of the base weight."""

    @abstractmethod
    def hold(self, folded_OI: Tensor, frozen_OI: Tensor) -> Tensor:
        """c(W') for a folded weight W' (out, in, ...) of the frozen one; new tensors, differentiable in W'."""


class Mask(Constraint):
    """Zeros of the base weight stay zero.

    Attributes:
        kept: how many weights of each row are not zero, (out,): by it a base with other zeros is told.
        bits: where weights are not zero, for a delta that trains a copy of the weight in its place.
    """

    kept: Tensor
    bits: Tensor | None

    @torch.no_grad()
    def __init__(self, site: Site, holds_weight: bool) -> None:
        super().__init__()
        weight_OI = site.base.weight(site.module)
        # Counts and not the mask itself: (out,) int32 goes into the adapter's file and tells bases apart nearly as
        # well.
        self.register_buffer("kept", _kept(weight_OI))
        # A trained copy may take any value, 0 included, so that what it was at the start has to be remembered.
        self.register_buffer("bits", weight_OI != 0 if holds_weight else None, persistent=False)

    def hold(self, folded_OI: Tensor, frozen_OI: Tensor) -> Tensor:
        # Read off the frozen weight: a mask of its own would be half as large as that is.
        return folded_OI * (frozen_OI != 0 if self.bits is None else self.bits)


def _kept(weight: Tensor) -> Tensor:
    # A convolution's (out, in, kh, kw) counts as (out, in kh kw).
    return (weight != 0).flatten(1).sum(1, dtype=torch.int32)


class Grid(Constraint):
    """Whole numbers times a scale for each group of inputs.

    Attributes:
        scales: (out, groups); they are computed with as they are stored.

    Args:
        start_OG: where they start, for a base that has scales already; otherwise those with the least error.
    """

    scales: Tensor

    def __init__(
        self, site: Site, bits: int, group_size: int | None, learns: bool, start_OG: Tensor | None = None
    ) -> None:
        super().__init__()
        self.bits, self.group_size = bits, group_size
        self._start_OG = start_OG
        spec = site.spec
        # (out, groups): input i of row o has the scale [o, i // group_size].
        groups = 1 if group_size is None else spec.shape[1] // group_size
        scales = torch.zeros(spec.shape[0], groups, device=spec.device)
        if learns:
            # In float32, as an adapter: a step on a scale in 16 bits would be lost.
            self.scales = nn.Parameter(scales)
        else:
            self.register_buffer("scales", scales.to(grid.SCALE_DTYPE))

    @torch.no_grad()
    def initialise(self, site: Site) -> None:
        weight_OI = site.base.weight(site.module)
        if self._start_OG is None:
            self._start_OG = grid.searched_scales(weight_OI, self.group_size or weight_OI.shape[1], self.bits)
        self.scales.copy_(self._start_OG)
        # Let go of: the base's own tensor, which would stay alive with the module.
        self._start_OG = None

    def hold(self, folded_OI: Tensor, frozen_OI: Tensor) -> Tensor:
        return _OnGrid.apply(folded_OI, self.scales, self.bits)  # type: ignore[return-value]

    def codes(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, int8 (out, in), and scales as they are stored, of a weight that was held."""
        scales_OG = self.scales.detach().to(grid.SCALE_DTYPE)
        return grid.nearest_codes(weight_OI, scales_OG, self.bits), scales_OG


class _OnGrid(torch.autograd.Function):
    """s round(w / s), with the gradient of w straight through."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, scales_OG: Tensor, bits: int) -> Tensor:
        stored = scales_OG.to(grid.SCALE_DTYPE)
        # By the scales as they are stored, in 16 bits: codes of finer scales would be others than those in the file.
        codes = grid.nearest_codes(weight_OI, stored, bits)
        ctx.bits = bits
        if ctx.needs_input_grad[1]:
            # Only for scales that learn; without, the backward pass needs nothing but the gradient itself.
            ctx.save_for_backward(weight_OI, stored)
        return grid.expand(codes, stored, weight_OI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *received: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g_OI,) = received
        if not ctx.needs_input_grad[1]:
            return g_OI, None, None
        weight_OI, scales_OG = ctx.saved_tensors
        return g_OI, _scale_gradient(g_OI, weight_OI, scales_OG, ctx.bits), None


def _scale_gradient(g_OI: Tensor, weight_OI: Tensor, scales_OG: Tensor, bits: int) -> Tensor:
    """dL/ds: of each weight its code less w / s within the codes, its code beyond them; (out, groups)."""
    shape = (*scales_OG.shape, -1)
    scales = scales_OG.float().unsqueeze(-1)
    # A scale of 0 is that of a group of zeros: 0 / 1 rounds to 0 as well, without a NaN.
    ratio = weight_OI.float().view(shape) / torch.where(scales == 0, 1.0, scales)
    lowest, highest = grid.code_range(bits)
    codes = ratio.round().clamp_(lowest, highest)
    # With r = w / s: d(s round(r))/ds = round(r) - r inside of the codes, and the outermost code beyond them. In place:
    # each tensor is as large as the weight, in float32.
    slope = codes.sub_(ratio.masked_fill_((ratio < lowest) | (ratio > highest), 0.0))
    gradient_OG = torch.linalg.vecdot(g_OI.float().view(shape), slope)
    # LSQ's factor: a scale moves all weights of its group, and its gradient would be as much larger.
    return gradient_OG / (slope.shape[-1] * highest) ** 0.5


class Constrained(Delta):
    """A delta whose merged weight is held to constraints, which are what it computes with.

    Attributes:
        inner: the delta, of which nothing but its `fold` is used while it is active.
        constraints: applied one after the other, the grid first.
    """

    def __init__(self, inner: Delta, constraints: Mapping[str, Constraint], base: Base) -> None:
        super().__init__()
        self.inner, self.constraints, self.base = inner, nn.ModuleDict(constraints), base

    def forward(self, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        module = base.module
        # A forward that isn't x W^T + b is run as it is, on a module that reads the merged weight in place of its own.
        if base.base.kind != "linear" or not base.base.is_textbook(module) or args or kwargs:
            return base.under(self.read_as(module), x, *args, **kwargs)

        # Called in the forward pass and again in the backward: the merged weight, as large as the base's, isn't kept
        # between.
        def build() -> tuple[Tensor, Tensor | None]:
            dense = self._merged(module)
            return dense["weight"], dense.get("bias")

        # Low-rank parts with the gradient straight through: dL/dA and dL/dB follow without dL/dW, which is (out, in).
        parts = self.inner.row_parts(base) if self._is_straight and not is_traced() else None
        if parts is not None and parts.input is None and parts.output is None:
            own = base.bias
            bias_O = own if parts.bias is None else parts.bias if own is None else (own + parts.bias).to(own.dtype)
            return straight_linear(x, build, bias_O, parts.a, parts.b)
        # Named one by one, since autograd doesn't see what `build` closes over.
        trained = [p for p in (*self.parameters(), *self.stand_ins().values()) if p.requires_grad]
        return rebuilt_linear(x, build, list(dict.fromkeys(trained)))

    @property
    def _is_straight(self) -> bool:
        """Whether the gradient of the merged weight is that of the folded one."""
        grids = [each for each in self.constraints.values() if isinstance(each, Grid)]
        # A mask zeroes some of the gradient, and scales that learn need all of it.
        return len(grids) == len(self.constraints) > 0 and not any(each.scales.requires_grad for each in grids)

    def _merged(self, module: Any) -> Dense:
        """The module's own parameters with the delta folded in, the weight as (out, in, ...), differentiable."""
        own: Dense = {"weight": self.base.weight(module)}
        bias = self.base.bias(module)
        if bias is not None:
            own["bias"] = bias
        return self.fold(own)

    def read_as(self, module: Any) -> Dense:
        return self.base.repack(module, self._merged(module))

    def fold(self, dense: Dense) -> Dense:
        return self.fold_beside(dense, dense)

    def fold_beside(self, dense: Dense, frozen: Dense) -> Dense:
        folded = self.inner.fold_beside(dense, frozen)
        weight = folded["weight"]
        for constraint in self.constraints.values():
            weight = constraint.hold(weight, frozen["weight"])  # type: ignore[operator]
        # The bias is left as it was folded: a grid or a mask is one of weights.
        return folded | {"weight": weight}

    def initialise(self, config: Any, site: Site) -> None:
        self.inner.initialise(config, site)
        for constraint in self.constraints.values():
            constraint.initialise(site)  # type: ignore[operator]

    def check_base(self, site: Site, stored: Mapping[str, Tensor]) -> None:
        """See that the base has the zeros that stored tensors, by their keys in the file, were trained with.

        Raises:
            BaseMismatchError: it has others.
        """
        kept = stored.get(key(site.name, "constraints.mask.kept"))
        own = _kept(site.base.weight(site.module))
        if kept is not None and not torch.equal(own.cpu(), kept.cpu()):
            raise BaseMismatchError(
                f"the adapter was trained with zeros that '{site.name}' doesn't have here; load it on the pruned model "
                "that it was trained on"
            )

    # What the other delta is asked elsewhere.

    @property
    def holds(self) -> bool:
        return self.inner.holds

    def stand_ins(self) -> dict[str, Tensor]:
        return self.inner.stand_ins()

    def excludes(self, other: Any) -> bool:
        """Beside any other: their sum would be off the constraint."""
        # One adapter at a time: each is on the grid by itself, and the sum of two is on none.
        return True

    def to_disk(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inner = {name.removeprefix("inner."): t for name, t in own.items() if name.startswith("inner.")}
        rest = {name: tensor for name, tensor in own.items() if not name.startswith("inner.")}
        return self.inner.to_disk(inner) | rest

    def from_disk(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inner = {f"inner.{name}": tensor for name, tensor in self.inner.from_disk(stored).items()}
        return inner | {name: stored[name] for name in self.state_dict() if not name.startswith("inner.")}

    def progress(self) -> dict[str, Tensor]:
        return self.inner.progress()

    def restore_progress(self, stored: Mapping[str, Tensor]) -> None:
        self.inner.restore_progress(stored)


def inner_of(delta: Any) -> Any:
    """The delta of a method, whether it is constrained or not."""
    return delta.inner if isinstance(delta, Constrained) else delta
