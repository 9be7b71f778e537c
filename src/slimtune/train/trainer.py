"""transformers' Trainer, with the answers' loss watched and rates of LoRA+ where asked for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from slimtune.data.batches import Objective
from slimtune.train.allocation import RankAllocation
from slimtune.train.checks import LastGood
from slimtune.train.lora_plus import lora_plus_groups


class AnswerTrainer(Trainer):
    """Stops with TrainingError at the first loss that is not a number, with the last good weights put back."""

    def __init__(self, *args: Any, last_good: LastGood, lora_plus_ratio: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, callbacks=[last_good, RankAllocation(), *kwargs.pop("callbacks", [])], **kwargs)
        self.last_good = last_good
        self.lora_plus_ratio = lora_plus_ratio

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's own, or with the groups of LoRA+."""
        if self.optimizer is None and self.lora_plus_ratio is not None:
            groups = lora_plus_groups(
                cast(nn.Module, self.model), self.args.learning_rate, self.lora_plus_ratio, self.args.weight_decay
            )
            optimizer_class, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(groups, **options)
        return super().create_optimizer(model)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's own; raises TrainingError if the loss is not a number."""
        loss = super().training_step(*args, **kwargs)
        if not math.isfinite(loss.item()):
            self.last_good.stop(f"the loss became {loss.item()}", self.args, self.state)
        return loss


@dataclass(frozen=True)
class Kind:
    """A kind of training: its Trainer, the Trainer's arguments, and what puts back what they change in a model."""

    trainer: Callable[..., AnswerTrainer]
    arguments: Callable[..., TrainingArguments] = TrainingArguments
    keeping: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    share_of_rate: float = 1.0
    """Of a method's own learning rate, where the settings give none."""


def supervised(objective: Objective) -> Kind:
    """Examples with their labels, learned by transformers' own Trainer."""
    return Kind(functools.partial(AnswerTrainer, data_collator=objective.collate, compute_loss_func=objective.loss))
