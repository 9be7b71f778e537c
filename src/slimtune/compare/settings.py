"""The compare section of a recipe: what is compared, and under which budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from slimtune.compare.arms import Arm, arms_of
from slimtune.errors import ConfigError, check_choice, check_number, check_whole, did_you_mean

SPECTRA = ("all", "first", "none")


@dataclass(frozen=True)
class CompareSettings:
    """Settings of a comparison; raises ConfigError for values that can't be.

    Attributes:
        methods: names of `slimtune methods`, `qlora`, and variants such as `lora:r=64`.
        shots: how many examples stand in the prompt of the model as it comes; 0 asks it outright.
        random_labels: whether the longest prompt is tried with answers dealt at random, too.
        learning_rates: of methods by name, in place of their own or the recipe's.
        seeds: of weights, order and examples, from 0 on.
        max_steps: of every method, in place of the recipe's training.
        questions: how many of the held-out rows are asked, from the first on; None asks all.
        scorer: of the answers, as `slimtune evaluate` has them.
        max_new_tokens: the longest answer; None allows twice the longest expected one.
        texts: how many texts of each shipped set forgetting is measured on; None takes all, 0 leaves it out.
        spectra: of which seeds the singular values are looked at: all, first or none.
    """

    methods: tuple[str, ...] = ("full", "lora", "qlora", "dora")
    shots: tuple[int, ...] = (0, 1, 4)
    random_labels: bool = True
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    seeds: int = 3
    max_steps: int | None = None
    questions: int | None = None
    scorer: str = "auto"
    max_new_tokens: int | None = None
    texts: int | None = None
    spectra: str = "first"

    def __post_init__(self) -> None:
        from slimtune.evaluate.scorers import check_scorer

        for name, kind in (("methods", str), ("shots", int)):
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or not all(type(value) is kind for value in values):
                raise ConfigError(f"compare.{name} must be a list of {kind.__name__}, found {values!r}")
            object.__setattr__(self, name, tuple(values))
        check_choice("compare.random_labels", self.random_labels, (True, False))
        check_choice("compare.spectra", self.spectra, SPECTRA)
        check_whole("compare.seeds", self.seeds)
        for name, least in (("max_steps", 1), ("questions", 2), ("max_new_tokens", 1), ("texts", 0)):
            if getattr(self, name) is not None:
                check_whole(f"compare.{name}", getattr(self, name), least)
        check_scorer(self.scorer)
        _ = self.arms
        if not isinstance(self.learning_rates, Mapping):
            raise ConfigError(f"compare.learning_rates must map methods to rates, found {self.learning_rates!r}")
        for name, rate in self.learning_rates.items():
            check_number(f"compare.learning_rates.{name}", rate, 0)

    @property
    def arms(self) -> list[Arm]:
        """What is compared."""
        return arms_of(self.methods, self.shots, self.random_labels)

    @classmethod
    def of(cls, values: Any) -> CompareSettings:
        """From the section of a recipe, or from nothing; raises ConfigError for a key that isn't known."""
        if values is None:
            return cls()
        if not isinstance(values, Mapping):
            raise ConfigError(f"the compare section must hold settings, found {values!r}")
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                near = did_you_mean(str(name), known) or f"; it has {', '.join(known)}"
                raise ConfigError(f"the compare section has no '{name}'{near}")
        return cls(**values)
