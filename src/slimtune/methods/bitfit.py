"""BitFit: tuning the biases alone (Ben Zaken et al. 2021, arXiv:2106.10199).

y = f(x; W, c + b),  b = 0 at the start;  for a linear layer that is  y = base(x) + b
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from slimtune.core.config import TargetedConfig, register
from slimtune.core.delta import Difference, RowParts, wrong_kind
from slimtune.core.frozen import Frozen, Site
from slimtune.errors import ConfigError, TargetError


@register
@dataclass
class BitFitConfig(TargetedConfig):
    """Which biases to tune.

    Trained is b, the difference to the module's own bias c, in place of c itself: it is stored small, switched off and
    added to others. An optimizer sees the same gradients, so that Adam takes the same steps as on c; weight decay
    draws towards the base's biases and not towards zero.

    `target_modules=None` means every module with a bias, normalisations included. `add_bias` gives linear and
    convolution layers that have none a bias, by default the linear layers of the repeated blocks; no merge can write
    such a bias into the base.

    Raises:
        ConfigError: an unknown field, a value out of range.
    """

    peft_type: str | None = "BITFIT"
    add_bias: bool = False

    learning_rate: ClassVar[float] = 1e-3
    way_out: ClassVar[str] = "set add_bias=True to give the linear layers of the blocks one"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.add_bias, bool):
            raise ConfigError(f"add_bias must be True or False, found {self.add_bias!r}")

    @property
    def default_targets(self) -> Any:
        return ("bias", "linear") if self.add_bias else ("bias",)

    def delta_for(self, site: Site, autocast_adapter_dtype: bool = True) -> BitFitDelta:
        """The change of one bias. Raises: TargetError."""
        own = site.module._parameters
        # A layer made with bias=False keeps an empty place of that name; a Llama's norm has no such place.
        may_be_given = "bias" in own and site.kind in ("linear", "conv")
        if own.get("bias") is None and not (may_be_given and self.add_bias):
            if may_be_given:
                raise TargetError(f"'{site.name}' has no bias to tune; set add_bias=True to give it one")
            raise wrong_kind(site, "BitFit", "modules with a bias")
        return BitFitDelta(site, ["bias"], autocast_adapter_dtype)

    def combined(self, others: Sequence[BitFitConfig], how: str, rank: int | None) -> BitFitConfig:
        """The config of a weighted sum of biases. Raises: ConfigError."""
        if rank is not None:
            raise ConfigError(f"biases have no rank to choose; leave out svd_rank, found {rank}")
        added = any(config.add_bias for config in (self, *others))
        return replace(self, target_modules=self.joined_targets(others), add_bias=added)


class BitFitDelta(Difference):
    """b, (out,) in float32 where the base is in 16 bits; c + b stands in for the bias while the module runs."""

    on_disk = {"difference.bias": "bitfit_bias"}

    def row_parts(self, base: Frozen) -> RowParts | None:
        # A layer that goes on behind its product adds its bias before that.
        is_sum = base.base.kind == "linear" and base.base.is_textbook(base.module)
        return RowParts(bias=self.difference["bias"]) if is_sum else None
