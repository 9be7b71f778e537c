"""The compare section of a recipe: what is compared, and under which budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from slimtune.errors import ConfigError, check_choice, check_number, check_whole, did_you_mean
from slimtune.evaluate.scorers import AUTO, CHOICE, check_scorer
from slimtune.recipe.candidates import Candidate, candidates_of

SPECTRA = ("all", "first", "none")
SHOTS = (0, 1, 4)


@dataclass(frozen=True)
class CompareSettings:
    """Settings of a comparison; raises ConfigError for values that can't be.

    Attributes:
        methods: names of `slimtune methods`, `qlora`, and variants such as `lora:r=64`.
        shots: how many examples stand in the prompt of the model as it comes; 0 gives none. None tries 0, 1 and 4
            where the model writes text, and none where it doesn't.
        random_labels: whether the longest prompt is tried with answers dealt at random, too.
        learning_rates: of methods by name, in place of their own or the recipe's.
        seeds: of weights, order and examples, from 0 on.
        max_steps: of every method, in place of the recipe's training.
        questions: how many of the held-out rows are answered, from the first on; None takes all.
        scorer: of the answers, as `slimtune evaluate` has them.
        max_new_tokens: the longest answer; None allows twice the longest expected one.
        texts: how many texts of each shipped set forgetting is measured on; None takes all, 0 leaves it out.
        spectra: of which seeds the singular values are looked at: all, first or none.
    """

    methods: tuple[str, ...] = ("full", "lora", "qlora", "dora")
    shots: tuple[int, ...] | None = None
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
        for name, kind in (("methods", str), ("shots", int)):
            values = getattr(self, name)
            if name == "shots" and values is None:
                continue
            if not isinstance(values, list | tuple) or not all(type(value) is kind for value in values):
                raise ConfigError(f"compare.{name} must be a list of {kind.__name__}, found {values!r}")
            # The dataclass is frozen for everybody else; lists of YAML become tuples here, so that it can be hashed.
            object.__setattr__(self, name, tuple(values))
        check_choice("compare.random_labels", self.random_labels, (True, False))
        check_choice("compare.spectra", self.spectra, SPECTRA)
        check_whole("compare.seeds", self.seeds)
        for name, least in (("max_steps", 1), ("questions", 2), ("max_new_tokens", 1), ("texts", 0)):
            if getattr(self, name) is not None:
                check_whole(f"compare.{name}", getattr(self, name), least)
        check_scorer(self.scorer)
        # Made once to be checked: a name that is given twice is said with the other mistakes of the recipe.
        _ = self.candidates
        if not isinstance(self.learning_rates, Mapping):
            raise ConfigError(f"compare.learning_rates must map methods to rates, found {self.learning_rates!r}")
        for name, rate in self.learning_rates.items():
            check_number(f"compare.learning_rates.{name}", rate, 0)

    @property
    def candidates(self) -> list[Candidate]:
        """What is compared."""
        return candidates_of(self.methods, SHOTS if self.shots is None else self.shots, self.random_labels)

    def for_task(self, kind: str, writes_text: bool) -> CompareSettings:
        """These settings for data of a kind ("text", "classification") and a model that writes text or doesn't.

        Raises: ConfigError, for what would change nothing there, or has nothing to work on.
        """
        if kind == "classification":
            idle = [name for name in ("max_new_tokens", "texts") if getattr(self, name)]
            if idle:
                raise ConfigError(f"compare.{idle[0]} would change nothing for data with labels; leave it out")
            if self.scorer not in (AUTO, CHOICE):
                raise ConfigError(
                    f"labels are judged by their {CHOICE}, and compare.scorer is {self.scorer!r}; leave it out"
                )
        if writes_text:
            return self
        if self.shots:
            raise ConfigError(
                f"the model writes no text, so that it can't be prompted, and compare.shots is {list(self.shots)}; "
                "leave it out"
            )
        return replace(self, shots=())

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
