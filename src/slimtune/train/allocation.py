"""AdaLoRA's schedule inside of transformers' Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from slimtune.methods.adalora import AdaLoraConfig
from slimtune.model import PeftModel


class RankAllocation(TrainerCallback):
    """Shares the ranks of AdaLoRA adapters out anew after each step; on a model without one it does nothing.

    Where a config doesn't say `total_step`, that is the number of steps that the Trainer is going to take.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take the number of steps over. Raises: ConfigError, where the schedule leaves none for ranks to fall."""
        for config in _schedules(model):
            if config.total_step is None:
                config.plan(state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Share out, while the gradients are still there."""
        if _schedules(model):
            model.update_and_allocate(state.global_step)


def _schedules(model: Any) -> list[AdaLoraConfig]:
    configs = [model.peft_config[name] for name in model.active_adapters] if isinstance(model, PeftModel) else []
    return [config for config in configs if isinstance(config, AdaLoraConfig)]
