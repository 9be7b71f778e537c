"""How a training runs, apart from the method and the data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slimtune.errors import ConfigError, MissingDependencyError, check_whole, did_you_mean
from slimtune.recipe.optimizers import DEFAULT, check_name

SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
)  # fmt: skip
"""transformers' names. They stand here because importing it takes seconds; a test holds that none is missing."""
ON_PLATEAU = ("reduce_lr_on_plateau", "greedy")
"""Those that follow the loss on held-out examples."""

_AT_LEAST_ONE = (
    "max_steps", "batch_size", "gradient_accumulation", "logging_steps", "eval_steps", "early_stopping_patience",
    "save_steps", "save_total_limit",
)  # fmt: skip
_POSITIVE = ("learning_rate", "epochs", "max_grad_norm", "lora_plus_ratio")
_NOT_NEGATIVE = ("warmup", "weight_decay", "save_minutes", "dataloader_workers", "samples")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a run; raises ConfigError for values that can't be.

    Args:
        learning_rate: by default the method's own.
        max_steps: stop after so many optimizer steps, whatever `epochs` says.
        gradient_accumulation: batches per optimizer step; the loss is the mean over the tokens of all of them.
        scheduler: one of transformers'; `scheduler_options` are the arguments of its own, such as `min_lr`.
        warmup: steps, or a share of them below 1.
        lora_plus_ratio: LoRA+, how many times faster B learns than A.
        share_prefixes: compute what the rows of a batch begin with once; by default where it pays and the model can.
        group_prefixes: draw batches of examples that begin alike, so that they share more; else at random.
        logging_steps: steps between two lines of loss.jsonl; their mean is written.
        eval_steps: steps between two evaluations on the held-out examples; by default one at the end of each epoch.
        samples: how many held-out questions are answered at each evaluation, shown and written to samples.jsonl.
        keep_best: the score of the evaluations ("loss", or one of the task's, such as "accuracy") by which the best
            weights are kept, and written at the end in place of the last ones.
        early_stopping_patience: stop after so many evaluations without a better score; the best weights are kept.
        save_steps: steps between two checkpoints; by default they are `save_minutes` apart, and 0 minutes means none.
        save_total_limit: how many checkpoints there are at most, besides the best one.
        report_to: trackers, by transformers' names.
        dataloader_workers: processes that prepare batches.
        seed: of everything that is drawn, the order of the examples too.
    """

    learning_rate: float | None = None
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    optim: str = DEFAULT
    scheduler: str = "linear"
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora_plus_ratio: float | None = None
    gradient_checkpointing: bool = False
    share_prefixes: bool | None = None
    group_prefixes: bool = False
    logging_steps: int = 1
    eval_steps: int | None = None
    samples: int = 0
    keep_best: str | None = None
    early_stopping_patience: int | None = None
    save_steps: int | None = None
    save_minutes: float = 10.0
    save_total_limit: int = 2
    report_to: str | Sequence[str] = "none"
    dataloader_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        given = {name for name in self.__dataclass_fields__ if getattr(self, name) is not None}
        for name in _AT_LEAST_ONE:
            if name in given:
                check_whole(name, getattr(self, name))
        for name in (*_POSITIVE, *_NOT_NEGATIVE):
            # A bound without an end is none.
            if name in given and name != "max_grad_norm" and math.isinf(getattr(self, name)):
                raise ConfigError(f"{name} must be a finite number, but is {getattr(self, name)}")
        # numpy's generator takes no more than 32 bits.
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**32):
            raise ConfigError(f"seed must be a whole number from 0 to 2**32 - 1, found {self.seed!r}")
        for name in _POSITIVE:
            if name in given and not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, but is {getattr(self, name)}; give it more")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, but is {getattr(self, name)}; pass 0 or more")
        check_name(self.optim)
        if self.group_prefixes and self.share_prefixes is False:
            raise ConfigError(
                "training.group_prefixes would change nothing but the order with training.share_prefixes=false; leave "
                "one of them out"
            )
        if self.scheduler not in SCHEDULERS:
            near = did_you_mean(self.scheduler, SCHEDULERS)
            raise ConfigError(f"no scheduler '{self.scheduler}'; pass one of {', '.join(SCHEDULERS)}{near}")
        read_trackers(self.report_to)

    @property
    def trackers(self) -> tuple[str, ...]:
        """What is reported to."""
        return read_trackers(self.report_to)

    @property
    def asks_to_share(self) -> bool:
        """Whether what rows begin with must be shared, and not only where the model can."""
        return bool(self.share_prefixes or self.group_prefixes)

    @property
    def best_by(self) -> str | None:
        """The score by which the best weights are kept, if they are: stopping early is of no use without."""
        return self.keep_best or ("loss" if self.early_stopping_patience else None)

    @property
    def of_held_out(self) -> list[str]:
        """The settings among these that need held-out examples."""
        names = ("eval_steps", "samples", "keep_best", "early_stopping_patience")
        return [n for n in names if getattr(self, n)] + ["scheduler"] * (self.scheduler in ON_PLATEAU)


PACKAGES = {
    "azure_ml": "azureml-core", "clearml": "clearml", "codecarbon": "codecarbon", "comet_ml": "comet-ml",
    "dagshub": "dagshub", "dvclive": "dvclive", "flyte": "flytekit", "mlflow": "mlflow", "neptune": "neptune",
    "swanlab": "swanlab", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip
"""The trackers by transformers' names, each with what pip calls it."""


def read_trackers(report_to: str | Sequence[str]) -> tuple[str, ...]:
    """The trackers that `report_to` names: one, several (a list, or between commas), or "none".

    Raises: ConfigError, for a name that transformers has no integration for.
    """
    named = report_to.split(",") if isinstance(report_to, str) else report_to
    trackers = tuple(name.strip() for name in named if name.strip() not in ("", "none"))
    for name in trackers:
        if name not in PACKAGES:
            near = did_you_mean(name, PACKAGES) or f"; there are {', '.join(PACKAGES)}, and none"
            raise ConfigError(f"report_to names no tracker '{name}'{near}")
    return trackers


def check_installed(trackers: Sequence[str]) -> None:
    """See that transformers can report to them here. Raises: MissingDependencyError."""
    from transformers.integrations import integration_utils as known

    # transformers' own word for a tracker that is there: some are not usable though they are installed.
    checks = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
    for name in trackers:
        if not getattr(known, f"is_{checks.get(name, name)}_available")():
            raise MissingDependencyError(
                f"report_to names {name}, which is not installed, or not set up, here: pip install {PACKAGES[name]}"
            )
