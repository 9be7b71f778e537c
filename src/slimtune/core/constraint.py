"""What the merged weights of an adapter are held to, as a user asks for it; `core/constrained.py` does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from slimtune.errors import ConfigError, check_choice, did_you_mean

BITS = (4, 8)
GROUPS = (32, 64, 128, 256)
DEFAULT_GROUP = 64


@dataclass(frozen=True)
class ConstraintConfig:
    """What the merged weights are held to; with nothing set, to nothing.

    Attributes:
        mask: zeros of the base's linear and convolution layers stay zero.
        num_bits: the weights of the linear layers lie on the grid of 4 or 8 bits, those without an adapter too.
        group_size: how many inputs share a scale of 4 bits, 64 by default; 8 bits have a scale for each row.
        learn_scales: train the scales of the grid beside the adapter.
        ignore: linear layers that are on no grid: names, ends of paths or regular expressions.

    Raises:
        ConfigError: a value that can't be.
    """

    mask: bool = False
    num_bits: int | None = None
    group_size: int | None = None
    learn_scales: bool = False
    ignore: list[str] = field(default_factory=list)

    # As the recipe's own sections: a key that doesn't exist is refused, and nothing is cast.
    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True}

    def __post_init__(self) -> None:
        check_choice("constraint.mask", self.mask, (True, False))
        check_choice("constraint.learn_scales", self.learn_scales, (True, False))
        if self.num_bits not in (None, *BITS) or isinstance(self.num_bits, bool):
            raise ConfigError(f"constraint.num_bits must be 4 or 8, found {self.num_bits!r}")
        if self.num_bits != 4 and self.group_size is not None:
            raise ConfigError("constraint.group_size is of 4 bits, and 8 bits have a scale a row; leave it out")
        if self.num_bits == 4 and self.group_size is None:
            # Written in, so that a stored config says what it was trained with even where a later default is another.
            object.__setattr__(self, "group_size", DEFAULT_GROUP)
        if self.group_size not in (None, *GROUPS):
            known = ", ".join(map(str, GROUPS))
            raise ConfigError(f"constraint.group_size must be one of {known}, found {self.group_size!r}")
        if isinstance(self.ignore, str) or not all(isinstance(name, str) for name in self.ignore):
            raise ConfigError(f"constraint.ignore must be a list of module names, found {self.ignore!r}")
        idle = [name for name in ("learn_scales", "ignore") if getattr(self, name)] if self.num_bits is None else []
        if idle:
            raise ConfigError(f"constraint.{idle[0]} would change nothing without num_bits; leave it out")

    def __bool__(self) -> bool:
        return self.mask or self.num_bits is not None

    def __str__(self) -> str:
        parts = ["zeros stay zero"] if self.mask else []
        if self.num_bits is not None:
            groups = f" in groups of {self.group_size}" if self.group_size else ""
            learned = ", scales learned" if self.learn_scales else ""
            parts.append(f"on the grid of {self.num_bits} bits{groups}{learned}")
        return " and ".join(parts)

    @classmethod
    def of(cls, value: Any) -> ConstraintConfig | None:
        """From a config's field, which may be a mapping from a file. Raises: ConfigError."""
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"constraint must be a ConstraintConfig or a mapping, found {value!r}")
        unknown = value.keys() - asdict(cls()).keys()
        if unknown:
            near = did_you_mean(min(unknown), asdict(cls())) or f"; there are {', '.join(asdict(cls()))}"
            raise ConfigError(f"constraint has no field {min(unknown)!r}{near}")
        return cls(**value)
