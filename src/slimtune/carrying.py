"""A model that carries adapters: which there are, which are active, and what they train."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from slimtune import merge as merging
from slimtune.adapter import adopted_modules
from slimtune.adopt import Adopted
from slimtune.config import PeftConfig
from slimtune.coverage import Coverage, count_of, coverage
from slimtune.delta import deltas_of
from slimtune.errors import AdapterNotFoundError, ConfigError, did_you_mean, listing


class Carrying(Adopted):
    """What a `PeftModel` knows of its adapters; its attributes are told there."""

    adopted_from: ClassVar[type[nn.Module]]
    peft_config: dict[str, PeftConfig]
    return_logits: bool
    kept: merging.Kept
    trained_before: set[str]

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that are in effect, or would be if they weren't disabled."""
        return list(self.adapter_switch.active)

    @property
    def active_adapter(self) -> str:
        """The active adapter; the first of several."""
        return self.adapter_switch.active[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the active adapter."""
        return self.peft_config[self.active_adapter]

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter or several the active ones; these alone are trainable, unless for inference.

        Raises:
            AdapterNotFoundError: there is no adapter of that name.
            ConfigError: two of them train the same module whole.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        self._check_known(*names)
        model: Any = self
        modules = adopted_modules(model)
        for path, module in modules:
            own = deltas_of(module)
            together = [own[name] for name in names if name in own]
            if any(one.excludes(other) for one, other in itertools.combinations(together, 2)):
                what = f"train their own copy of what '{path}' has" if path else "put tokens of their own in front"
                raise ConfigError(
                    f"the adapters {listing(names)} each {what} and can't be active together; activate one of them"
                )
        self.adapter_switch.active = names
        for _, module in modules:
            for name, delta in deltas_of(module).items():
                for parameter in delta.parameters():
                    parameter.requires_grad = name in names and not inference_mode

    def disable_adapter_layers(self) -> None:
        """The base without its unmerged adapters until `enable_adapter_layers`."""
        self.adapter_switch.enabled = False

    def enable_adapter_layers(self) -> None:
        """The active adapters in effect again."""
        self.adapter_switch.enabled = True

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable parameters, all parameters)."""
        model: Any = self
        parameters = list(model.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(count_of(p) for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trainable, of how many."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def coverage(self, adapter_name: str | None = None) -> Coverage:
        """Which modules an adapter (the active one) trains, how many of how many; `print` it."""
        name = adapter_name or self.active_adapter
        self._check_known(name)
        return coverage(self, name)

    def _check_known(self, *names: str) -> None:
        for name in names:
            if name not in self.peft_config:
                raise AdapterNotFoundError(
                    f"there is no adapter '{name}'; there are {listing(self.peft_config) or 'none'}"
                    f"{did_you_mean(name, self.peft_config)}"
                )
