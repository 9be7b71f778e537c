"""The section of a recipe for preference tuning, and which of it each task takes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from slimtune.errors import ConfigError, check_choice, check_number, check_whole, listing

EXACT_MATCH = "exact-match"
PREFERENCE_TASKS = ("dpo", "kto", "orpo", "grpo")
SHARE_OF_RATE = 0.1
"""Of a method's own learning rate: preferences move a model that answers already."""

TAKEN = {
    "dpo": {"beta": "beta", "loss_type": "loss_type", "label_smoothing": "label_smoothing"},
    "kto": {name: name for name in ("beta", "desirable_weight", "undesirable_weight")},
    "orpo": {"beta": "beta"},
    "grpo": {
        "beta": "beta",
        "loss_type": "loss_type",
        "generations": "num_generations",
        "max_new_tokens": "max_completion_length",
        "temperature": "temperature",
    },
}
"""Which settings each task hands to TRL, and TRL's names for them."""
LOSSES = {
    "dpo": (
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
    ),
    "grpo": ("dapo", "grpo", "dr_grpo", "bnpo", "cispo"),
}  # fmt: skip


@dataclass(frozen=True)
class PreferenceSettings:
    """What these kinds of training have beside the settings of every run; what is None is as TRL has it.

    Attributes:
        beta: the weight of staying near the base: 0.1, and 0 for grpo, which then needs no reference. For orpo the
            weight of the odds ratio, 0.1.
        loss_type: for dpo "sigmoid" or one of its variants, for grpo "dapo" or one of its own.
        label_smoothing: for dpo, the share of pairs whose order is taken to be wrong.
        desirable_weight: for kto, of the good answers; with the other one it balances how many there are of both.
        undesirable_weight: for kto, of the bad answers.
        reward: for grpo, what judges the answers: "exact-match" with the data's answer, or path.py:function.
        generations: for grpo, the answers that are drawn to each prompt, 8.
        max_new_tokens: for grpo, of an answer, 512.
        temperature: for grpo, of drawing answers, 1.
    """

    beta: float | None = None
    loss_type: str | None = None
    label_smoothing: float | None = None
    desirable_weight: float | None = None
    undesirable_weight: float | None = None
    reward: str | None = None
    generations: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0)
        if self.label_smoothing is not None:
            check_number("label_smoothing", self.label_smoothing, 0, 0.5)
        if self.generations is not None:
            check_whole("generations", self.generations, 2)
        if self.max_new_tokens is not None:
            check_whole("max_new_tokens", self.max_new_tokens)
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"temperature must be above 0 to draw answers that differ, found {self.temperature}")

    @property
    def given(self) -> dict[str, Any]:
        """Those that were set."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def check_for(self, task: str) -> None:
        """See that nothing would be ignored; raises ConfigError."""
        taken = {*TAKEN.get(task, {}), *(("reward",) if task == "grpo" else ())}
        strangers = self.given.keys() - taken
        if strangers:
            what = f"takes {', '.join(sorted(taken))}" if taken else "takes no such settings"
            raise ConfigError(f"{listing(strangers)} would change nothing with task {task}, which {what}; leave it out")
        if self.loss_type is not None:
            check_choice(f"loss_type of {task}", self.loss_type, LOSSES[task])

    def for_trl(self, task: str) -> dict[str, Any]:
        """By TRL's names; raises ConfigError as `check_for`."""
        self.check_for(task)
        return {TAKEN[task][name]: value for name, value in self.given.items() if name in TAKEN[task]}
