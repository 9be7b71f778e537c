"""AdaLoRA inside of transformers' Trainer: its schedule, and its part of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from slimtune.delta import deltas_of
from slimtune.methods.adalora import AdaLoraConfig, Orthogonality
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


def with_penalty(model: Any, share: float, compute: Callable[[], Any]) -> Any:
    """The loss that `compute` gives, or the first of what it gives, with AdaLoRA's distance from orthogonality once.

    The model adds it to a loss of its own. Another loss, made of the logits, would be without.

    Args:
        share: of the step's loss that is this batch's.
    """
    found = [deltas_of(model)[n] for n in model.active_adapters if n in deltas_of(model)] if _schedules(model) else []
    penalties = [delta for delta in found if isinstance(delta, Orthogonality) and delta.training and delta.watched]
    for delta in penalties:
        delta.share, delta.joined = share, False
    result = compute()
    loss: Tensor = result[0] if isinstance(result, tuple) else result
    for delta in penalties:
        if not delta.joined:
            loss = loss + delta.penalty(loss.device)
        delta.share = 1.0
    return (loss, *result[1:]) if isinstance(result, tuple) else loss


def _schedules(model: Any) -> list[AdaLoraConfig]:
    configs = [model.peft_config[name] for name in model.active_adapters] if isinstance(model, PeftModel) else []
    return [config for config in configs if isinstance(config, AdaLoraConfig)]
