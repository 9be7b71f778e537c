"""The one abstraction: a method is a formula around a frozen callable.

A `PeftConfig` says what a user wants, a `Base` knows the bits of one kind of frozen weight, and a `Delta` is the
trainable change that the config builds for one site: M methods and B kinds of base cost M + B pieces of code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from slimtune.core.frozen import Dense, Frozen, Site, statistics
from slimtune.errors import ConfigError, MergeError, TargetError


@dataclass(frozen=True)
class RowParts:
    """A change of a linear layer at rest, as what it does to each row.

        h = o * (base(i * x) + B A (i * x)),   y = h + U f(D h + d) + p

    What isn't there is one, or zero for what is added. Rows under changes of different methods then share one product
    with the frozen weight, and one with the factors of all.

    Attributes:
        a, b: A (r, in) and B (out, r), with their scale in B.
        input, output: i (in,) and o (out,).
        bottleneck: D, d, U and f.
        bias: p (out,).
    """

    a: Tensor | None = None
    b: Tensor | None = None
    input: Tensor | None = None
    output: Tensor | None = None
    bottleneck: RowBottleneck | None = None
    bias: Tensor | None = None


class RowBottleneck(NamedTuple):
    """U f(D h + d) of a layer's output h: D (m, out), d (m,), U (out, m), with the scale in U."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    activation: Callable[[Tensor], Tensor]


class Delta(nn.Module):
    """A trainable change to one frozen module.

    After `hold`, `whole` has parameters of the module that are trained as such (a bias, a new head) and `running` its
    statistics: while the delta is active they stand in for the module's own.
    """

    whole: nn.ParameterDict
    running: BufferDict

    on_disk: ClassVar[Mapping[str, str]] = {}
    """What the file format calls each parameter, after the site's name and a dot."""

    unmergeable: ClassVar[str] = ""
    """Why a change of this method can't be written into weights, a sentence; empty where it can."""

    tied: Mapping[str, tuple[Any, str]] = {}
    """Of parameters that are tied in the base, the delta that trains them and their name there."""

    reweighs: ClassVar[bool] = False
    """Whether the formula is a change of parameters, right for whatever the module computes from them."""

    rests: ClassVar[bool] = False
    """Whether it does nothing outside of training."""

    def forward(self, base: Frozen, *args: Any, **kwargs: Any) -> Any:
        """The method's equation; `base(x)` is what the frozen module computes."""
        return base(*args, **kwargs)

    def row_parts(self, base: Frozen) -> RowParts | None:
        """The equation at rest as what it does to each row of a linear layer; None where it has no such form.

        What is held whole isn't in it.
        """
        return None

    def initialise(self, config: Any, site: Site) -> None:
        """Set the parameters to where training starts, as the config asks."""

    def disk_name(self, parameter: str) -> str:
        """What the file format calls this parameter or buffer, after the site's name and a dot.

        A name that starts with a slash stands alone, without the site's name.
        """
        return self.on_disk.get(parameter) or parameter.removeprefix("whole.").removeprefix("running.")

    def to_disk(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is stored, by `disk_name`, from the parameters and buffers by their names here."""
        return {self.disk_name(name): tensor for name, tensor in own.items()}

    def from_disk(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_disk`."""
        return {name: stored[self.disk_name(name)] for name in self.state_dict()}

    def fold(self, dense: Dense) -> Dense:
        """The equation written into dense parameters, as new tensors; what is held whole is there already.

        It is differentiable as the forward is, where gradients are wanted: under a constraint it is what is trained.

        Raises:
            MergeError: the change can't be written into the weights.
        """
        if self.unmergeable:
            raise MergeError(self.unmergeable)
        return dense

    def fold_beside(self, dense: Dense, frozen: Dense) -> Dense:
        """As `fold`, where other adapters may be in `dense` already; `frozen` is without any."""
        return self.fold(dense)

    @classmethod
    def combine(
        cls, deltas: list[Any], weights: list[float], how: str, target: Any, site: Site, **options: Any
    ) -> None:
        """Set `target` to a weighted combination of deltas. Raises: ConfigError, for methods that have none."""
        raise ConfigError(f"adapters with a {cls.__name__} can't be combined by '{how}'")

    def hold(self, site: Site, *names: str) -> None:
        """Train copies of these parameters of the module in place of its own."""
        own = {name: site.base.floating(site.module, name) for name in names}
        # Clones: the base stays frozen and shared, whatever this delta learns.
        self.whole = nn.ParameterDict({name: p.detach().clone() for name, p in own.items() if p is not None})

    def hold_all(self, site: Site) -> None:
        """Train a copy of everything that the module itself owns, running statistics included."""
        self.hold(site, *(name for name, _ in site.module.named_parameters(recurse=False)))
        self.hold_statistics(site.module)

    def hold_statistics(self, module: nn.Module) -> None:
        """Keep copies of the module's running statistics in place of its own."""
        self.whole = self.whole if self.holds else nn.ParameterDict()
        self.running = BufferDict()
        for name, buffer in statistics(module).items():
            # A batch norm in training updates its statistics even with frozen weights; they'd leak into the base
            # otherwise.
            self.running.register_buffer(name, buffer.detach().clone())

    def hold_beside(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor in place of the module's own of that name; it is neither trained nor stored."""
        self.whole = self.whole if self.holds else nn.ParameterDict()
        self.running = self.running if "running" in self._modules else BufferDict()
        self.running.register_buffer(name, tensor.detach(), persistent=False)

    def stand_ins(self) -> dict[str, Tensor]:
        """What replaces the module's own parameters and buffers while this delta is active."""
        if not self.holds:
            return {}
        running = dict(self.running.named_buffers()) if "running" in self._modules else {}
        tied = {name: owner.whole[its_name] for name, (owner, its_name) in self.tied.items()}
        return dict(self.whole.items()) | running | tied

    def read_as(self, module: Any) -> dict[str, Tensor] | None:
        """What must stand in for the module's parameters where they are read past its forward; None if nothing can."""
        return self.stand_ins() if self.holds else None

    @property
    def holds(self) -> bool:
        """Whether parameters of the module are trained whole."""
        return "whole" in self._modules

    def excludes(self, other: Any) -> bool:
        """Whether this delta and another one on the same module can't be active together."""
        return self.holds and other.holds

    def progress(self) -> dict[str, Tensor]:
        """What training goes by besides parameters and buffers, for a checkpoint; most methods have none."""
        return {}

    def restore_progress(self, stored: Mapping[str, Tensor]) -> None:
        """Go on from what `progress` gave."""


class BufferDict(nn.Module):
    """Buffers by name: the running statistics of a module that is trained whole."""


def trainable_dtype(dtype: torch.dtype, autocast_adapter_dtype: bool) -> torch.dtype:
    """The dtype of a delta on a weight of this dtype: 16-bit steps are too coarse for small updates."""
    # Only 16 bits are widened: float64 stays, and 8-bit floats never come here as what is computed in.
    return torch.float32 if autocast_adapter_dtype and dtype in (torch.float16, torch.bfloat16) else dtype


def added(dense: Dense, update: Tensor) -> Dense:
    """The parameters with an update of the weight, added in float32 or better and rounded once."""
    weight = dense["weight"]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return dense | {"weight": weight.to(dtype).add(update.to(dtype).reshape(weight.shape)).to(weight.dtype)}


def wrong_kind(site: Site, method_name: str, takes: str) -> TargetError:
    """The error for a module that a method can't change."""
    return TargetError(f"{method_name} can't attach to '{site.name}', a {type(site.module).__name__}; it takes {takes}")


class Difference(Delta):
    """Trained differences to parameters of the module: its own forward, with W + D standing in for W.

    D is zero at the start. The sum is formed in D's dtype and rounded to W's. A parameter that the module could have
    but hasn't, such as a bias that is None, counts as zero.

    Attributes:
        difference: D by the name of the parameter, laid out as the module stores it.
    """

    difference: nn.ParameterDict

    def __init__(self, site: Site, names: Sequence[str], autocast: bool) -> None:
        super().__init__()
        self.base = site.base
        self.difference = nn.ParameterDict()
        for name in names:
            own = site.base.floating(site.module, name)
            like = site.spec if own is None else own
            shape = (site.base.features(site.module)[1],) if own is None else own.shape
            dtype = trainable_dtype(like.dtype, autocast)
            self.difference[name] = nn.Parameter(torch.zeros(shape, device=like.device, dtype=dtype))

    @property
    def differences(self) -> dict[str, Tensor]:
        """D by the name of the parameter."""
        return dict(self.difference.items())

    def forward(self, base: Frozen, *args: Any, **kwargs: Any) -> Any:
        return base.under(self.read_as(base.module), *args, **kwargs)

    def read_as(self, module: Any) -> dict[str, Tensor]:
        sums = {}
        for name, d in self.differences.items():
            # Read at each call and not kept: adapters underneath may have put another tensor there by now.
            own = self.base.floating(module, name)
            sums[name] = d.to(self.base.spec(module).dtype) if own is None else (own + d).to(own.dtype)
        return sums

    def fold(self, dense: Dense) -> Dense:
        """W + D. Raises: MergeError, where the module has no place for it."""
        # D lies as the module stores its weight, a dense weight lies as (out, in).
        changes = {n: self.base.turned(d) if n == "weight" else d for n, d in self.differences.items()}
        for name in changes.keys() - dense.keys():
            raise MergeError(
                f"the base's architecture has no place for a {name} here, so that none can be written into it; keep "
                "the adapter apart"
            )
        return dense | {name: (dense[name] + d).to(dense[name].dtype) for name, d in changes.items()}

    @classmethod
    def combine(
        cls, deltas: list[Any], weights: list[float], how: str, target: Any, site: Site, **options: Any
    ) -> None:
        """Set `target` to sum_i w_i D_i. Raises: ConfigError."""
        add_up(deltas, weights, how, target, **options)


@torch.no_grad()
def add_up(deltas: list[Any], weights: list[float], how: str, target: nn.Module, **options: Any) -> None:
    """Set the parameters of `target` to the weighted sum of the deltas'.

    A sum of full rank is its own best approximation, so that "svd" and "linear" are the same here.

    Raises:
        ConfigError: another way of combining, options for one, or deltas of other shapes.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if how not in ("linear", "svd") or given:
        raise ConfigError(
            f"these adapters are combined by their weighted sum alone; use combination_type='linear', found {how!r}"
            + "".join(f" with {name}={value!r}" for name, value in given.items())
        )
    for name, parameter in target.named_parameters():
        terms = [delta.get_parameter(name) for delta in deltas]
        if any(term.shape != parameter.shape for term in terms):
            raise ConfigError(f"'{name}' has other shapes in these adapters, which can't be added up")
        parameter.zero_()
        for weight, term in zip(weights, terms, strict=True):
            parameter.add_(term, alpha=weight)
