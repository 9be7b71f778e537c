"""What the starts of LoRA that have settings of their own are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from slimtune.errors import ConfigError, did_you_mean


@dataclass
class EvaConfig:
    """How EVA finds and shares out the ranks; names, defaults and meanings are those of `peft.EvaConfig`.

    Args:
        rho: a module gets at most rho * r ranks; 1 leaves all ranks as they are.
        tau: a direction has settled when its cosine with the one before is at least this.
        use_label_mask, label_mask_value: leave out the tokens whose label is this value.
        whiten: divide each direction by the root of its singular value.
        adjust_scaling_factors: give a module with another rank the alpha that keeps its scale.

    Raises:
        ConfigError: a value out of range.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise ConfigError(f"rho must be at least 1, found {self.rho!r}")
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"tau must lie in [0, 1], found {self.tau!r}")


@dataclass
class LoftQConfig:
    """How LoftQ quantizes; names and defaults are those of `peft.LoftQConfig`.

    The base is quantized already and stays as it is, so that both fields have but one value here.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def check(self) -> None:
        """Raises: ConfigError, for what would need another base."""
        if self.loftq_bits != 4:
            raise ConfigError(
                f"loftq_bits must be 4, found {self.loftq_bits!r}; the bits are those that the base is loaded in, and "
                "LoftQ is for 4"
            )
        if self.loftq_iter != 1:
            raise ConfigError(
                f"loftq_iter must be 1, found {self.loftq_iter!r}; a second iteration quantizes the base anew, and the "
                "base is frozen here and shared by all adapters; leave loftq_iter out, and choose a higher r to start "
                "nearer to the weights from before quantization"
            )


S = TypeVar("S", EvaConfig, LoftQConfig)


def settings(kind: type[S], given: Mapping[str, Any]) -> S:
    """A start's own settings from a mapping. Raises: ConfigError, for a field that doesn't exist."""
    known = [f.name for f in fields(kind)]
    for name in given:
        if name not in known:
            near = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise ConfigError(f"{kind.__name__} has no field '{name}'{near}")
    return kind(**given)
