"""How a training runs, apart from the method and the data."""

from __future__ import annotations

from dataclasses import dataclass

from slimtune.errors import ConfigError, did_you_mean
from slimtune.train.optimizer import DEFAULT, check_name

SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a run; raises ConfigError for values that can't be."""

    learning_rate: float
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    optim: str = DEFAULT
    scheduler: str = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora_plus_ratio: float | None = None
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("learning_rate", "epochs", "batch_size", "gradient_accumulation", "max_grad_norm")
        for name in [
            *positive,
            *(n for n in ("max_steps", "lora_plus_ratio") if getattr(self, n) is not None),
        ]:
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"{name} must be above 0, but is {getattr(self, name)}; pass --{name.replace('_', '-')} with more"
                )
        for name in ("warmup", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, but is {getattr(self, name)}; pass 0 or more")
        check_name(self.optim)
        if self.scheduler not in SCHEDULERS:
            near = did_you_mean(self.scheduler, SCHEDULERS)
            raise ConfigError(f"no scheduler '{self.scheduler}'; pass one of {', '.join(SCHEDULERS)}{near}")
