"""Full fine-tuning as an adapter, and its differences as task vectors (Ilharco et al. 2022, arXiv:2212.04089).

y = f(x; W + D),  D = 0 at the start   (store="difference")
y = f(x; W'),     W' = W at the start  (store="whole")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from slimtune.core.config import TargetedConfig, register
from slimtune.core.delta import Delta, Difference, wrong_kind
from slimtune.core.frozen import Site, statistics
from slimtune.errors import ConfigError, did_you_mean

STORES = ("difference", "whole")


@register
@dataclass
class FullConfig(TargetedConfig):
    """Train everything, or everything inside the named modules; a new head is trained and stored whole either way.

    With P parameters trained, beside the frozen base:

    - `store="difference"` holds D, P numbers, in float32 on a 16-bit base; each forward forms W + D, and training
      keeps those sums until backward, P more numbers in the base's dtype. Differences of several adapters add up, and
      can be combined with weights.
    - `store="whole"` holds W' in the base's dtype, P numbers and no sums; 16-bit weights lose updates that are small
      beside them. Two such adapters can't be active together.

    A quantized weight is expanded for either: W' of a 4-bit base is four times its size, in 16 bits, and D eight times.

    Gradients and the optimizer's state come on top, as in any full fine-tuning; what neither saves is the base, which
    stays for switching back. Parameters that are tied in the base are one parameter here too.

    Raises:
        ConfigError: an unknown field, a value out of range.
    """

    peft_type: str | None = "FULL"
    store: str = "difference"

    learning_rate: ClassVar[float] = 2e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.store not in STORES:
            raise ConfigError(
                f"store must be one of {', '.join(STORES)}, found {self.store!r}{did_you_mean(str(self.store), STORES)}"
            )

    @property
    def default_targets(self) -> Any:
        return ("everything",)

    def delta_for(self, site: Site, autocast_adapter_dtype: bool = True) -> FullDifference | FullCopy:
        """What is trained of one module's own parameters. Raises: TargetError."""
        own = {name: site.base.floating(site.module, name) for name, _ in site.module.named_parameters(recurse=False)}
        if not own or not all(tensor is not None and tensor.is_floating_point() for tensor in own.values()):
            raise wrong_kind(
                site, "full tuning", "modules with parameters of their own that have a floating-point form"
            )
        return FullCopy(site) if self.store == "whole" else FullDifference(site, [*own], autocast_adapter_dtype)

    def link_deltas(self, model: Any, drafted: Sequence[tuple[Site, Any]]) -> None:
        """Make what is trained of tied parameters one."""
        first: dict[int, tuple[Any, str]] = {}
        for site, delta in drafted:
            if not isinstance(delta, FullDifference | FullCopy):
                continue
            for name, parameter in site.module.named_parameters(recurse=False):
                # By identity: `tie_weights` of transformers puts the same Parameter object into both modules.
                owner, its_name = first.setdefault(id(parameter), (delta, name))
                if owner is not delta:
                    # One parameter for both ends: trained twice, the ends of a tie would drift apart.
                    del delta.own[name]
                    delta.tied = {**delta.tied, name: (owner, its_name)}

    def combined(self, others: Sequence[FullConfig], how: str, rank: int | None) -> FullConfig:
        """The config of a weighted sum of differences. Raises: ConfigError."""
        if any(config.store != "difference" for config in (self, *others)):
            raise ConfigError("weights that are stored whole don't add up; only store='difference' can be combined")
        if rank is not None:
            raise ConfigError(f"differences of full rank have no rank to choose; leave out svd_rank, found {rank}")
        if any(config.target_modules != self.target_modules for config in others):
            raise ConfigError("only full adapters with the same target_modules can be combined")
        return replace(self)


class FullDifference(Difference):
    """D for every parameter that the module itself owns; running statistics are kept whole."""

    reweighs = True

    def __init__(self, site: Site, names: Sequence[str], autocast: bool) -> None:
        super().__init__(site, names, autocast)
        # A batch norm's running mean is no parameter: it can't be a difference that is learned.
        if statistics(site.module):
            self.hold_statistics(site.module)

    @property
    def own(self) -> nn.ParameterDict:
        """What this delta trains itself."""
        return self.difference

    @property
    def differences(self) -> dict[str, Tensor]:
        return dict(self.difference.items()) | {
            name: owner.own[its_name] for name, (owner, its_name) in self.tied.items()
        }


class FullCopy(Delta):
    """A copy of every parameter and running statistic that the module itself owns."""

    reweighs = True

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.hold_all(site)

    @property
    def own(self) -> nn.ParameterDict:
        """What this delta trains itself."""
        return self.whole
