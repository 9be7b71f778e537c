"""(IA)^3: inner activations inhibited and amplified by learned vectors (Liu et al. 2022, arXiv:2205.05638).

y = l * base(x)  at keys and values,  y = base(l * x)  at the second layer of the feed-forward
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimtune.core.config import TargetedConfig, register
from slimtune.core.delta import Delta, RowParts, add_up, trainable_dtype, wrong_kind
from slimtune.core.frozen import Dense, Frozen, Site
from slimtune.core.patterns import compiled
from slimtune.errors import ConfigError, did_you_mean, listing
from slimtune.ops.scaling import scaled


@register
@dataclass
class IA3Config(TargetedConfig):
    """What to scale with (IA)^3; names, defaults and meanings are those of `peft.IA3Config`.

    `target_modules=None` means keys, values and the second layer of each feed-forward, as in the paper; where query,
    key and value are one layer, all three are scaled. `feedforward_modules` are those targets that are scaled on
    their input, as names (endings of paths) or an expression; None finds the second layers of the feed-forwards.

    Raises:
        ConfigError: an unknown field, or a feed-forward that is no target.
    """

    in_peft: ClassVar[bool] = True
    peft_type: str | None = "IA3"
    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    learning_rate: ClassVar[float] = 3e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, list | tuple):
            self.feedforward_modules = set(self.feedforward_modules)
        if isinstance(self.feedforward_modules, set) and isinstance(self.target_modules, set):
            for name in sorted(self.feedforward_modules - self.target_modules):
                raise ConfigError(
                    f"feedforward_modules names '{name}', which is not among target_modules"
                    f"{did_you_mean(name, self.target_modules) or '; there are ' + listing(self.target_modules)}"
                )
        if not isinstance(self.init_ia3_weights, bool):
            raise ConfigError(f"init_ia3_weights must be True or False, found {self.init_ia3_weights!r}")

    @property
    def default_targets(self) -> Any:
        return ("key", "value", "query_key_value", "feed_forward_out")

    def scales_input(self, site: Site) -> bool:
        """Whether the vector stands in front of the module."""
        names = self.feedforward_modules
        if names is None:
            return site.role == "feed_forward_out"
        if isinstance(names, str):
            return compiled(names).match(site.name, whole=True) is not None
        # By the end of the path without a dot before it, as `peft` matches these.
        return any(site.name.endswith(name) for name in names)

    def delta_for(self, site: Site, autocast_adapter_dtype: bool = True) -> IA3Delta:
        """The vector for one site. Raises: TargetError."""
        if site.kind not in ("linear", "conv"):
            raise wrong_kind(site, "IA3", "linear and convolution layers")
        return IA3Delta(site, self.scales_input(site), autocast_adapter_dtype)

    def link_deltas(self, model: Any, drafted: Sequence[tuple[Site, Any]]) -> None:
        """Note which targets are scaled on their input.

        Raises:
            ConfigError: a name in `feedforward_modules` that no target is called.
        """
        sites = [site for site, delta in drafted if isinstance(delta, IA3Delta)]
        in_front = [site for site in sites if self.scales_input(site)]
        if self.feedforward_modules is None:
            self.feedforward_modules = self._called(sites, in_front)
        elif isinstance(self.feedforward_modules, set):
            for name in self.feedforward_modules - set(self.target_modules or ()):
                if not any(site.name.endswith(name) for site in in_front):
                    raise ConfigError(
                        f"feedforward_modules names '{name}', which none of the targets is called; they are "
                        f"{listing(site.name for site in sites)}"
                    )

    def _called(self, sites: Sequence[Site], in_front: Sequence[Site]) -> set[str]:
        """Names for the sites in front of which a vector stands; `peft` wants them to be among the targets' names."""
        paths = {site.name for site in in_front}
        names = self.target_modules
        if not isinstance(names, set):
            return paths
        short = {name for name in names if any(path == name or path.endswith(f".{name}") for path in paths)}
        if {site.name for site in sites if any(site.name.endswith(name) for name in short)} == paths:
            return short
        # One name means both sorts, as BERT's 'dense' does: only whole paths tell them apart.
        self.target_modules = {site.name for site in sites}
        return paths

    def combined(self, others: Sequence[IA3Config], how: str, rank: int | None) -> IA3Config:
        """The config of a weighted sum of vectors. Raises: ConfigError."""
        if rank is not None:
            raise ConfigError(f"vectors have no rank to choose; leave out svd_rank, found {rank}")
        in_front = [config.feedforward_modules for config in (self, *others)]
        if len({type(names) for names in in_front}) > 1:
            raise ConfigError("adapters whose feedforward_modules are names don't combine with one of an expression")
        if isinstance(self.feedforward_modules, str):
            joined: Any = "|".join(f"({expression})" for expression in in_front)
        else:
            joined = set().union(*(names or () for names in in_front))
        return replace(self, target_modules=self.joined_targets(others), feedforward_modules=joined)


class IA3Delta(Delta):
    """y_TO = l_O * base(x_TI), or y_TO = base(l_I * x_TI); over the channels of a convolution.

    Attributes:
        ia3_l: the vector, laid out as in the file: (O, 1), or (1, I) on the input; (1, channels, 1, ...) for
            convolutions.
        in_front: whether it scales the input.
    """

    def __init__(self, site: Site, in_front: bool, autocast: bool) -> None:
        super().__init__()
        self.in_front = in_front
        weight = site.spec
        features = site.base.features(site.module)[0 if in_front else 1]
        # Axes of the kernel, of size one: the vector then multiplies an (N, channels, ...) tensor as it is.
        ones = (1,) * (len(weight.shape) - 2)
        shape = (1, features, *ones) if in_front or ones else (features, 1)
        dtype = trainable_dtype(weight.dtype, autocast)
        self.ia3_l = nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype))

    def initialise(self, config: IA3Config, site: Site) -> None:
        """Ones, which change nothing; drawn for `init_ia3_weights=False`."""
        nn.init.ones_(self.ia3_l) if config.init_ia3_weights else nn.init.normal_(self.ia3_l)

    def forward(self, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # (n,) for a linear layer, (channels, 1, ...) for a convolution: both broadcast from the right, so that batches
        # without a batch axis work as well.
        vector = self.ia3_l.view(-1, *self.ia3_l.shape[2:])
        if self.in_front:
            # l_I x, (tokens, in): in 16 bits kept as it came, or not at all where a gate made it (ops/scaling.py).
            return base(scaled(x, vector), *args, **kwargs)
        # The bias is inside: it is scaled with the product; `fold` does the same.
        return scaled(base(x, *args, **kwargs), vector)

    def row_parts(self, base: Frozen) -> RowParts | None:
        if base.base.kind != "linear":
            return None
        vector = self.ia3_l.flatten()
        return RowParts(input=vector) if self.in_front else RowParts(output=vector)

    def fold(self, dense: Dense) -> Dense:
        """l_O W_OI and l_O b_O, or W_OI l_I."""
        weight, vector = dense["weight"], self.ia3_l.flatten()
        tail = (1,) * (len(weight.shape) - 2)
        if self.in_front:
            # In a grouped convolution each group of outputs reads its own inputs.
            groups = vector.numel() // weight.shape[1]
            # The weight is (out, in / groups, ...) while the vector has an entry for each of all `in` channels.
            rows = vector.view(groups, -1)
            rows = rows if groups == 1 else rows.repeat_interleave(weight.shape[0] // groups, dim=0)
            return dense | {"weight": (weight * rows.view(*rows.shape, *tail)).to(weight.dtype)}
        folded = {"weight": (weight * vector.view(-1, 1, *tail)).to(weight.dtype)}
        if "bias" in dense:
            # Behind the module the bias is scaled with everything else.
            folded["bias"] = (dense["bias"] * vector).to(dense["bias"].dtype)
        return dense | folded

    @classmethod
    def combine(
        cls, deltas: list[Any], weights: list[float], how: str, target: Any, site: Site, **options: Any
    ) -> None:
        """Set `target` to sum_i w_i l_i. Raises: ConfigError."""
        add_up(deltas, weights, how, target, **options)

    def extra_repr(self) -> str:
        return f"{self.ia3_l.numel()} on the {'input' if self.in_front else 'output'}"
