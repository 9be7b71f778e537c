"""LayerNorm tuning (Zhao et al. 2023, arXiv:2312.11420): the gains and biases of the normalisations are trained.

y = norm(x) * g + b,  with copies of g and b in place of the base's
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from slimtune.core.config import TargetedConfig, register
from slimtune.core.delta import Delta, wrong_kind
from slimtune.core.frozen import Site


@register
@dataclass
class LNTuningConfig(TargetedConfig):
    """Which normalisations to train; names, defaults and meanings are those of `peft.LNTuningConfig`.

    `target_modules=None` means all LayerNorms, RMSNorms and GroupNorms of the model. The copies have the dtype of the
    base's parameters, as in `peft`. Two such adapters can't be active together on one module.

    Raises:
        ConfigError: an unknown field.
    """

    in_peft: ClassVar[bool] = True
    peft_type: str | None = "LN_TUNING"

    learning_rate: ClassVar[float] = 1e-3

    @property
    def default_targets(self) -> Any:
        return ("norm",)

    def delta_for(self, site: Site, autocast_adapter_dtype: bool = True) -> LNTuningDelta:
        """The trained copy of one module. Raises: TargetError, where it has no parameters."""
        if next(site.module.parameters(recurse=False), None) is None:
            raise wrong_kind(site, "LayerNorm tuning", "modules with parameters of their own")
        delta = LNTuningDelta()
        delta.hold_all(site)
        return delta


class LNTuningDelta(Delta):
    """The parameters of a module, trained whole in its own dtype."""

    def disk_name(self, parameter: str) -> str:
        # `peft` keeps its copies in a ModuleDict of that name inside of its wrapper.
        return f"ln_tuning_layers.{super().disk_name(parameter)}"
