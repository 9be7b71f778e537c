"""transformers' Trainer, with checkpoints that a run goes on from to the bit, the loss watched, and rates of LoRA+."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from slimtune.data.batches import Objective, count_packed
from slimtune.storage.tree import read_tree
from slimtune.train.allocation import RankAllocation, with_penalty
from slimtune.train.checks import LastGood
from slimtune.train.held_out import HeldOutMean
from slimtune.train.keep import TRAINING, WEIGHTS, Keeper
from slimtune.train.lora_plus import lora_plus_groups
from slimtune.train.state import restore_random_state, restore_weights


class Kept:
    """Mixed in front of a Trainer (TRL's too): its checkpoints are those of a `Keeper`, whole, exact and no pickle.

    Its own hold no state of AdaLoRA, lose a loss that is not logged yet, and are half there after a kill.
    """

    keeper: Keeper
    model: Any
    optimizer: Any
    lr_scheduler: Any
    args: Any
    state: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.store_flos()  # type: ignore[attr-defined]
        self.keeper.save(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore_weights(self.model, read_tree(Path(resume_from_checkpoint), WEIGHTS))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            stored = read_tree(Path(checkpoint), TRAINING)
            self.optimizer.load_state_dict(stored["optimizer"])
            self.lr_scheduler.load_state_dict(stored["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random_state(read_tree(Path(checkpoint), TRAINING)["random"], self.args.device)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; the first time in a resumed run, the loss that was summed up for the log is put back."""
        start, self.keeper.start = self.keeper.start, None
        if start is not None:
            facts = self.keeper.facts
            self._tr_loss.fill_(facts["loss_since_logged"])  # type: ignore[attr-defined]
            self._globalstep_last_logged = facts["last_logged"]
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]


class AnswerTrainer(Kept, HeldOutMean, Trainer):
    """Stops with TrainingError at the first loss that is not a number, with the last good weights put back.

    Args:
        judge: scores of the model on the held-out examples, taken at each evaluation.
    """

    def __init__(
        self,
        *args: Any,
        last_good: LastGood,
        keeper: Keeper,
        lora_plus_ratio: float | None = None,
        judge: Callable[[Any], Mapping[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, callbacks=[last_good, RankAllocation(), *kwargs.pop("callbacks", [])], **kwargs)
        self.last_good, self.keeper, self.judge = last_good, keeper, judge
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

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own, with AdaLoRA's part of it."""
        counted = self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None
        # A loss over all tokens of a step adds up over its batches; others Trainer divides by their number.
        adds_up = counted or self.compute_loss_func is not None
        batches = getattr(self, "current_gradient_accumulation_steps", 1) if adds_up else 1
        compute = super().compute_loss
        return with_penalty(self.model, 1 / batches, lambda: compute(model, inputs, *args, **kwargs))

    def _clip_grad_norm(self, model: Any) -> Any:
        """Trainer's own, between backward and update; raises TrainingError if loss or gradient are no numbers."""
        norm: Any = super()._clip_grad_norm(model)
        self.last_good.check(self._tr_loss, norm, self.args, self.state)
        return norm

    def floating_point_ops(self, inputs: Any) -> int:
        """None: nobody is told of them, and Trainer would count all parameters anew for each batch."""
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Trainer's own, which counts padding where there is no attention mask, as in packed rows."""
        if "attention_mask" in inputs or "position_ids" not in inputs:
            super()._track_num_input_tokens(inputs)
        else:
            self.state.num_input_tokens_seen += count_packed(inputs["position_ids"])

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own, with the judge's scores."""
        output = super().evaluation_loop(*args, **kwargs)
        if self.judge is not None:
            metrics = output.metrics or {}
            metrics |= {f"eval_{name}": value for name, value in self.judge(self.model).items()}
        return output


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
