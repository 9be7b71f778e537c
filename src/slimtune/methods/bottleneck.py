"""Bottleneck adapters: a small network of two layers in each block (Houlsby et al. 2019, arXiv:1902.00751).

f(h_TD) = s * (dropout(act(h_TD A_MD^T + a_M)) B_DM^T + b_D),  M = D / reduction_factor

houlsby:  y = h + f(h), h the output projection's output, in attention and in the feed-forward
pfeiffer: the same in the feed-forward alone (Pfeiffer et al. 2020, arXiv:2005.00247)
parallel: y = h + f(x), x the input of the feed-forward (He et al. 2021, arXiv:2110.04366)
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.core.config import LayeredConfig, Whereabouts, register
from slimtune.core.delta import Delta, RowBottleneck, RowParts, trainable_dtype, wrong_kind
from slimtune.core.frozen import Frozen, Site
from slimtune.core.roles import Role
from slimtune.errors import ConfigError, TargetError, check_choice, check_number, check_whole, did_you_mean, listing

PLACEMENTS: dict[str, tuple[Role, ...]] = {
    "houlsby": ("attention_out", "feed_forward_out"),
    "pfeiffer": ("feed_forward_out",),
    "parallel": ("feed_forward_in", "feed_forward_out"),
}
NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": F.leaky_relu,
    "elu": F.elu,
    "mish": F.mish,
}
INITIALISATIONS = ("mam_adapter", "bert", "houlsby")
REDUCTION = 16
UNMERGEABLE = "a bottleneck adapter is no linear change and can't be merged; it stays apart and costs time at inference"


@register
@dataclass
class BottleneckConfig(LayeredConfig):
    """Where to put bottleneck adapters, and what they are like; the names are mostly those of the library `adapters`.

    `placement`: "houlsby", "pfeiffer" or "parallel", found by the structure of the blocks. With `target_modules` the
    first two put an adapter behind each module named. "parallel" needs the feed-forwards' input and output
    projections among them; where their names don't tell which is which, `input_modules` names the former.
    `reduction_factor` (16) or `bottleneck_size`: the width of the bottleneck, relative or absolute.
    `scaling`: a number, or "learned" for one trained number an adapter, from 1 on.
    `dropout`: of the bottleneck's activations.
    `init_weights`: "mam_adapter" starts as the identity, with B zero; "bert" draws A and B from a normal distribution
    with deviation 0.02, "houlsby" from one truncated with 0.01, which is near the identity.

    Raises:
        ConfigError: an unknown field, a value out of range, fields that exclude each other.
    """

    peft_type: str | None = "BOTTLENECK"
    placement: str = "houlsby"
    reduction_factor: float | None = None
    bottleneck_size: int | None = None
    non_linearity: str = "relu"
    scaling: float | str = 1.0
    dropout: float = 0.0
    init_weights: str = "mam_adapter"
    input_modules: list[str] | set[str] | None = None

    learning_rate: ClassVar[float] = 3e-4
    sizes: ClassVar[tuple[str, ...]] = ("bottleneck_size",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.found_by_structure = self.target_modules is None
        check_choice("placement", self.placement, tuple(PLACEMENTS))
        check_choice("non_linearity", self.non_linearity, tuple(NON_LINEARITIES))
        check_choice("init_weights", self.init_weights, INITIALISATIONS)
        check_number("dropout", self.dropout, 0, 1)
        if self.scaling != "learned":
            check_number("scaling (or 'learned')", self.scaling)
        self._check_width()
        self._check_inputs()

    def _check_width(self) -> None:
        if self.bottleneck_size is not None:
            if self.reduction_factor is not None:
                raise ConfigError(
                    "reduction_factor and bottleneck_size both set the width, found "
                    f"{self.reduction_factor!r} and {self.bottleneck_size!r}; give one of them"
                )
            check_whole("bottleneck_size", self.bottleneck_size)
            return
        if self.reduction_factor is None:
            self.reduction_factor = REDUCTION
        check_number("reduction_factor", self.reduction_factor)
        if not self.reduction_factor > 0:
            raise ConfigError(f"reduction_factor must be positive, found {self.reduction_factor!r}")

    def _check_inputs(self) -> None:
        if self.input_modules is None:
            return
        if self.placement != "parallel" or self.target_modules is None:
            raise ConfigError(
                "input_modules says which of the target_modules are the feed-forwards' input projections; it goes "
                "with placement='parallel' and target_modules"
            )
        if isinstance(self.input_modules, str):
            raise ConfigError(f"input_modules is a list of names, found {self.input_modules!r}; write it in brackets")
        self.input_modules = set(self.input_modules)

    @property
    def default_targets(self) -> tuple[Role | Whereabouts, ...]:
        return PLACEMENTS[self.placement]

    def delta_for(self, site: Site, autocast_adapter_dtype: bool = True) -> Delta:
        """The adapter for one site; for an input projection, what notes its input. Raises: TargetError, ConfigError."""
        if site.kind != "linear":
            raise wrong_kind(site, "a bottleneck adapter", "linear layers")
        if self._is_input(site):
            return FeedForwardInput()
        _, width = site.base.features(site.module)
        # Relative to the width that it is put at, which may differ between layers.
        size = self.bottleneck_size or int(width // (self.reduction_factor or REDUCTION))
        if size < 1:
            raise ConfigError(
                f"reduction_factor={self.reduction_factor:g} leaves no unit of the {width} of '{site.name}'; "
                f"choose at most {width}, or a bottleneck_size"
            )
        return BottleneckDelta(site, width, size, self, autocast_adapter_dtype)

    def _is_input(self, site: Site) -> bool:
        """Whether the adapter beside a feed-forward reads here."""
        if self.placement != "parallel":
            return False
        if self.input_modules is not None:
            return any(_ends_with(site.name, name) for name in self.input_modules)
        if site.role in ("feed_forward_in", "feed_forward_out"):
            return site.role == "feed_forward_in"
        raise TargetError(
            f"the name '{site.name}' doesn't tell whether a feed-forward begins or ends there; for "
            "placement='parallel' name both projections in target_modules and the former in input_modules"
        )

    def link_deltas(self, model: Any, drafted: list[tuple[Site, Any]]) -> None:
        """Check that all places were found; give each parallel adapter the input of its feed-forward.

        Raises:
            TargetError: a place or a partner is missing.
        """
        if self.placement == "parallel":
            self._check_named(drafted)
            unread = _link(drafted)
            # Of a gate and its twin, which read the same, one is enough.
            # In place: what is taken out here is attached nowhere.
            drafted[:] = [(site, delta) for site, delta in drafted if delta not in unread]
        elif self.found_by_structure:
            missing = set(PLACEMENTS[self.placement]) - {site.role for site, _ in drafted}
            if missing:
                raise TargetError(
                    f"placement='{self.placement}' attaches to {listing(PLACEMENTS[self.placement])}, of which "
                    f"{listing(missing)} isn't found in this model; name the modules in target_modules"
                )

    def _check_named(self, drafted: list[tuple[Site, Any]]) -> None:
        names = [site.name for site, _ in drafted]
        for wanted in self.input_modules or ():
            if not any(_ends_with(name, wanted) for name in names):
                near = did_you_mean(wanted, [name.rpartition(".")[2] for name in names])
                raise TargetError(f"input_modules names '{wanted}', which none of the target modules is called{near}")


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


class BottleneckDelta(Delta):
    """y_TO = base(x_TI) + f(h_TD), where h is the base's output or, in parallel, the feed-forward's input.

    Attributes:
        adapter_down: A (M, D) and its bias.
        adapter_up: B (O, M) and its bias; zero at the start.
        scaling: the factor s, a parameter if it is learned.
        noted: the input of the feed-forward that a parallel adapter reads.
    """

    unmergeable = UNMERGEABLE
    scaling: Any

    def __init__(self, site: Site, width: int, size: int, config: BottleneckConfig, autocast: bool) -> None:
        super().__init__()
        self.non_linearity, self.dropout = config.non_linearity, config.dropout
        self.noted: Noted | None = None
        weight = site.spec
        made: Any = {"device": weight.device, "dtype": trainable_dtype(weight.dtype, autocast)}
        self.adapter_down = _undrawn(width, size, made)
        self.adapter_up = _undrawn(size, width, made)
        self.scaling = nn.Parameter(torch.empty(1, **made)) if config.scaling == "learned" else config.scaling

    def initialise(self, config: BottleneckConfig, site: Site) -> None:
        down, up = self.adapter_down.weight, self.adapter_up.weight
        if config.init_weights == "mam_adapter":
            # B alone is zero: with A zero as well neither factor would ever get a gradient.
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            nn.init.zeros_(up)
        for weight in (down, up) if config.init_weights == "bert" else ():
            nn.init.normal_(weight, std=0.02)
        for weight in (down, up) if config.init_weights == "houlsby" else ():
            # a and b are absolute bounds in torch, here two deviations, as Houlsby et al. cut them.
            nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02)
        nn.init.zeros_(self.adapter_down.bias)
        nn.init.zeros_(self.adapter_up.bias)
        if isinstance(self.scaling, nn.Parameter):
            nn.init.ones_(self.scaling)

    def forward(self, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        read = None if self.noted is None else self.noted.take()
        h = base(x, *args, **kwargs)
        return (h + self.change(h if read is None else read)).to(h.dtype)

    def change(self, h: Tensor) -> Tensor:
        """f(h), in the dtype of h: what autograd keeps is then h as it is, and the small activations."""
        down, up = self.adapter_down, self.adapter_up
        z = F.linear(h, down.weight.to(h.dtype), down.bias.to(h.dtype))
        z = F.dropout(NON_LINEARITIES[self.non_linearity](z), self.dropout, self.training)
        # Scaled where it is small: s * (B z + b) = B (s z) + s b.
        return F.linear((self.scaling * z).to(h.dtype), up.weight.to(h.dtype), (self.scaling * up.bias).to(h.dtype))

    def row_parts(self, base: Frozen) -> RowParts | None:
        if self.noted is not None:
            return None
        down, up, f = self.adapter_down, self.adapter_up, NON_LINEARITIES[self.non_linearity]
        bottleneck = RowBottleneck(down.weight, down.bias, self.scaling * up.weight, f)
        return RowParts(bottleneck=bottleneck, bias=self.scaling * up.bias)

    def extra_repr(self) -> str:
        scaling = "learned" if isinstance(self.scaling, Tensor) else f"{self.scaling:g}"
        return f"{self.non_linearity}, scaling={scaling}, dropout={self.dropout:g}"


def _undrawn(features_in: int, features_out: int, made: dict[str, Any]) -> nn.Linear:
    """A linear layer whose parameters are still to be set."""
    # Not by torch's skip_init, which can't make tensors without data.
    layer = nn.Linear(features_in, features_out, device="meta")
    layer.weight = nn.Parameter(torch.empty(layer.weight.shape, **made))
    layer.bias = nn.Parameter(torch.empty(layer.bias.shape, **made))
    return layer


class FeedForwardInput(Delta):
    """y = base(x), with x noted for the adapter beside the feed-forward that begins here. It has no parameters."""

    unmergeable = UNMERGEABLE

    def __init__(self) -> None:
        super().__init__()
        self.noted = Noted()

    def forward(self, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.noted.x = x
        return base(x, *args, **kwargs)


class Noted(threading.local):
    """A tensor between two modules of one forward: each thread has its own, and copies start empty."""

    x: Tensor | None = None

    def take(self) -> Tensor:
        """The tensor, which isn't kept. Raises: TargetError, if there is none."""
        x, self.x = self.x, None
        if x is None:
            raise TargetError(
                "a parallel adapter was reached before the input of its feed-forward; check with coverage() which "
                "modules it was given, and name them in target_modules and input_modules"
            )
        return x

    def __reduce__(self) -> tuple[Any, ...]:
        return Noted, ()


def _link(drafted: list[tuple[Site, Any]]) -> set[nn.Module]:
    """Give each adapter the input projection of its feed-forward; gives back the input projections that none reads.

    A feed-forward is the smallest module around both of its projections.
    """
    begins = {site.name: (site, delta) for site, delta in drafted if isinstance(delta, FeedForwardInput)}
    ends = {site.name: (site, delta) for site, delta in drafted if isinstance(delta, BottleneckDelta)}
    around_begins, around_ends = _by_parent(begins), _by_parent(ends)
    unread: set[nn.Module] = set()
    for name, (site, begin) in begins.items():
        block = _smallest(name, around_ends)
        # A mixture of experts has several feed-forwards in one block, each with an end of its own.
        inside = [end for end in around_ends.get(block, []) if _smallest(end, around_begins) == block]
        if len(inside) != 1:
            raise TargetError(
                f"the feed-forward that begins at '{name}' should end in one target module, found "
                f"{listing(inside) or 'none'}; name the output projection beside it in target_modules"
            )
        output, adapter = ends[inside[0]]
        _check_widths(site, output)
        if adapter.noted is None:
            adapter.noted = begin.noted
        else:
            unread.add(begin)
    alone = [name for name, (_, adapter) in ends.items() if adapter.noted is None]
    if alone:
        raise TargetError(
            f"a parallel adapter reads the input of its feed-forward, but none begins beside '{alone[0]}'; name the "
            "input projection in target_modules, and in input_modules if its name doesn't tell"
        )
    return unread


def _parents(path: str) -> list[str]:
    """The paths of the modules around this one, the smallest first."""
    parts = path.split(".")[:-1]
    return [".".join(parts[:i]) for i in range(len(parts), -1, -1)]


def _by_parent(names: Iterable[str]) -> dict[str, list[str]]:
    """The names inside of each module around them."""
    inside: dict[str, list[str]] = {}
    for name in names:
        for parent in _parents(name):
            inside.setdefault(parent, []).append(name)
    return inside


def _smallest(path: str, around: Mapping[str, Any]) -> str:
    """The smallest module around this one that is around others too."""
    return next((parent for parent in _parents(path) if parent in around), "")


def _check_widths(begin: Site, end: Site) -> None:
    (width, _), (_, other) = begin.base.features(begin.module), end.base.features(end.module)
    if width != other:
        raise TargetError(
            f"a parallel adapter's input and output are equally wide; '{begin.name}' reads {width} and '{end.name}' "
            f"writes {other}"
        )
