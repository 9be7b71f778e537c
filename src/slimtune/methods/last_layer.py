"""Last-layer tuning: the output layer is trained on top of a frozen model ("Fine-tuning I").

y = W x + c,  with copies of W and c in place of the base's
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from slimtune.core.config import TargetedConfig, register
from slimtune.core.delta import Delta, wrong_kind
from slimtune.core.frozen import Site


@register
@dataclass
class LastLayerConfig(TargetedConfig):
    """Which output layers to train.

    `target_modules=None` means the new head of a classifier, all of it, or the output embedding of a language model.
    An output embedding that is tied to the input embedding is untied by its copy: the input embedding stays as it is,
    and a merge says so in the model's config. The copies have the dtype of the base's parameters; backward ends at the
    last hidden state, which is what makes the method cheap.

    Raises:
        ConfigError: an unknown field.
    """

    peft_type: str | None = "LAST_LAYER"

    learning_rate: ClassVar[float] = 1e-3
    way_out: ClassVar[str] = "name the last layers in target_modules"

    @property
    def default_targets(self) -> Any:
        return ("output",)

    def delta_for(self, site: Site, autocast_adapter_dtype: bool = True) -> Delta:
        """The trained copy of one module. Raises: TargetError, where it has no parameters."""
        if next(site.module.parameters(recurse=False), None) is None:
            raise wrong_kind(site, "last-layer tuning", "modules with parameters of their own")
        # The plain delta has no equation of its own: what it holds stands in for the module's parameters, and that is
        # all.
        delta = Delta()
        delta.hold_all(site)
        return delta
