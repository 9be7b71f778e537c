"""The Trainer of every run: transformers' own, corrected and extended by mixins that TRL's trainers take too.

- `HeldOutMean`: the held-out loss as a mean over tokens, not over batches.
- `ExactCheckpoints`: checkpoints from which a run goes on to the same bits.
- `RankAllocation`, `with_penalty`: AdaLoRA's schedule of ranks and its distance from orthogonality.
- `AnswerTrainer`: all of these, with the rates of LoRA+ and a stop at the first loss that is not a number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import SkipBatchSampler
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import find_batch_size

from slimtune.adapters.model import PeftModel
from slimtune.core.frozen import deltas_of
from slimtune.data.batches import IGNORED, Objective, count_packed
from slimtune.methods.adalora import AdaLoraConfig, Orthogonality
from slimtune.storage.tensor_tree import read_tree
from slimtune.train.checkpointing import TRAINING, WEIGHTS, Checkpointer
from slimtune.train.checks import LastGood
from slimtune.train.optimizer import lora_plus_groups
from slimtune.train.processes import from_main
from slimtune.train.state import load_optimizer_state, load_rng_state, load_trained_state


class HeldOutMean:
    """Mixed in front of a Trainer (TRL's too): `eval_loss` is sum_b(n_b * L_b) / sum_b(n_b) over all batches b.

    L_b is the mean over the n_b items of a batch: tokens that are learned, or texts with a label. Trainer's own is the
    mean over batches, in which an item counts for less the more of them share its batch.
    """

    accelerator: Any
    args: Any
    model_accepts_loss_kwargs: bool
    _filled_up: Any = None

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; the loss is recorded with the number of its items."""
        inputs = self._without_repeated(inputs)
        items = self.items_of(inputs)
        # Counted before: Trainer may take the labels out of the inputs.
        output = super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if output[0] is not None:
            self._recorded.append((output[0].detach(), items))
        return output

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval",
    ) -> Any:  # fmt: skip
        """Trainer's own, with the mean over all items in place of that over batches."""
        self._recorded: list[tuple[Tensor, Tensor]] = []
        output = super().evaluation_loop(  # type: ignore[misc]
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        if self._recorded:
            output.metrics[f"{metric_key_prefix}_loss"] = self._mean()
        return output

    def items_of(self, inputs: Any) -> Tensor:
        """The weight of a batch's loss in the sum over all batches and processes: (), its number of items."""
        # Of several processes each has its own sum, divided by the items of all and multiplied by their number.
        counted: Any = self._get_num_items_in_batch([inputs], self.args.device)  # type: ignore[attr-defined]
        if counted is not None:
            return counted / (self.args.world_size if self.args.average_tokens_across_devices else 1)
        # (N, T); a model that predicts the next token has no use for the first label.
        labels = inputs["labels"]
        shifted = labels[..., 1:] if self._loss_shifts_labels else labels  # type: ignore[attr-defined]
        return (shifted != IGNORED).sum()

    def _mean(self) -> float:
        # Two columns of one number for each batch, in float64: a sum over thousands of batches loses digits in float32.
        losses, items = (torch.stack(column).cpu().double() for column in zip(*self._recorded, strict=True))
        # A batch without items has a mean of NaN, which would spoil the sum.
        sums = torch.stack([torch.where(items > 0, losses * items, 0.0).sum(), items.sum()])
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum")
        return float(sums[0] / sums[1])

    def _own_rows(self, inputs: Any) -> int | None:
        """Of a last batch of several processes, the number of rows that don't repeat others; None where all are own."""
        state, rows = self.accelerator.gradient_state, find_batch_size(inputs) or 0
        if self.args.world_size == 1 or not state.end_of_dataloader:
            return None
        size, remainder = _last_batch(state)
        # Last batches are filled up to the size of all others. Examples that were packed into one row can't be told.
        if remainder <= 0 or rows * self.args.world_size != size:
            return None
        # The rows are dealt out by process; those from `remainder` on are repeated.
        return min(rows, max(0, remainder - self.args.process_index * rows))

    def _without_repeated(self, inputs: Any) -> Any:
        """The inputs with the labels ignored of examples that fill up the last batches of several processes."""
        own = self._own_rows(inputs)
        if own is None or "labels" not in inputs:
            return inputs
        labels = inputs["labels"].clone()
        labels[own:] = IGNORED
        return {**inputs, "labels": labels}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own, for a step of training: of several processes, without what fills up their last batches."""
        batches, counted = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if self.args.world_size == 1 or not self.accelerator.gradient_state.end_of_dataloader:
            return batches, counted
        batches[-1] = self._filled_up = self._without_repeated(batches[-1])
        return batches, self._get_num_items_in_batch(batches, self.args.device)  # type: ignore[attr-defined]


def _last_batch(state: Any) -> tuple[int, int]:
    """The examples of a batch of all processes, and of the last one without what fills it up, 0 for all of them."""
    dataloader = state.active_dataloader
    sampler = dataloader.batch_sampler
    if not isinstance(sampler, SkipBatchSampler):
        return dataloader.total_batch_size, state.remainder
    # In an epoch that is gone on with, accelerate doesn't find the size of a batch behind the sampler that skips, and
    # takes the last batch for a whole one.
    size = sampler.batch_sampler.batch_size * getattr(sampler.batch_sampler, "num_processes", 1)
    return size, len(dataloader.dataset) % size


class ExactCheckpoints:
    """Mixed in front of a Trainer (TRL's too): its checkpoints are those of a `Checkpointer`: whole, exact, no pickle.

    Trainer's own hold no state of AdaLoRA, lose a loss that is not logged yet, and are half there after a kill.
    """

    checkpointer: Checkpointer
    model: Any
    optimizer: Any
    lr_scheduler: Any
    args: Any
    state: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Trainer's method of the same name without its folder of pickles; its callbacks follow as usual.
        self.store_flos()  # type: ignore[attr-defined]
        self.checkpointer.save(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained_state(self.model, read_tree(Path(resume_from_checkpoint), WEIGHTS))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            # Called once the optimizer has its parameters, in the order in which they were saved.
            state = read_tree(Path(checkpoint), TRAINING)
            load_optimizer_state(self.optimizer, state["optimizer"])
            self.lr_scheduler.load_state_dict(state["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            random, process = read_tree(Path(checkpoint), TRAINING), self.args.process_index
            own = [random["random"], *random.get("random_of_others", [])]
            if process < len(own):
                load_rng_state(own[process], self.args.device)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; the first time in a resumed run, the loss that was summed up for the log is put back."""
        # The first call after Trainer has set both to zero, and the last before the first batch.
        resumed_from, self.checkpointer.resumed_from = self.checkpointer.resumed_from, None
        if resumed_from is not None:
            facts = self.checkpointer.facts
            own = facts.get("losses_since_logged", [])
            # Those of each process, or where there were other processes then, their mean.
            is_same = len(own) == self.args.world_size
            loss = own[self.args.process_index] if is_same else facts["loss_since_logged"]
            self._tr_loss.fill_(loss)  # type: ignore[attr-defined]
            self._globalstep_last_logged = facts["last_logged"]
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]


class RankAllocation(TrainerCallback):
    """Reallocates the ranks of AdaLoRA adapters after each step; does nothing on other models.

    Where a config doesn't say `total_step`, that is the number of steps that the Trainer is going to take.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Set the number of steps. Raises: ConfigError, where the schedule leaves none for ranks to fall."""
        for config in _schedules(model):
            if config.total_step is None:
                config.plan(state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Reallocate while the gradients still exist."""
        if _schedules(model):
            model.update_and_allocate(state.global_step)


def with_penalty(model: Any, share: float, compute: Callable[[], Any], factor: int = 1) -> Any:
    """The loss that `compute` gives, or the first of what it gives, with AdaLoRA's distance from orthogonality once.

    The model adds it to a loss of its own. Another loss, made of the logits, would be without.

    Args:
        share: of the step's loss that is this batch's.
        factor: by which `compute` multiplies the model's own loss.
    """
    deltas = [deltas_of(model)[n] for n in model.active_adapters if n in deltas_of(model)] if _schedules(model) else []
    penalties = [delta for delta in deltas if isinstance(delta, Orthogonality) and delta.training and delta.watched]
    for delta in penalties:
        # `joined` tells afterwards whether the model's own loss took the penalty in.
        delta.share, delta.joined = share / factor, False
    result = compute()
    loss: Tensor = result[0] if isinstance(result, tuple) else result
    for delta in penalties:
        if not delta.joined:
            loss = loss + factor * delta.penalty(loss.device)
        delta.share = 1.0
    return (loss, *result[1:]) if isinstance(result, tuple) else loss


def _schedules(model: Any) -> list[AdaLoraConfig]:
    configs = [model.peft_config[name] for name in model.active_adapters] if isinstance(model, PeftModel) else []
    return [config for config in configs if isinstance(config, AdaLoraConfig)]


class AnswerTrainer(ExactCheckpoints, HeldOutMean, Trainer):
    """Stops with TrainingError at the first loss that is not a number, with the last good weights put back.

    Args:
        judge: scores of the model on the held-out examples, taken at each evaluation.

    Attributes:
        train_sampler: draws the examples in place of Trainer's own sampler, if it is set.
    """

    train_sampler: Sampler[int] | None = None

    def __init__(
        self,
        *args: Any,
        last_good: LastGood,
        checkpointer: Checkpointer,
        lora_plus_ratio: float | None = None,
        judge: Callable[[Any], Mapping[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, callbacks=[last_good, RankAllocation(), *kwargs.pop("callbacks", [])], **kwargs)
        self.last_good, self.checkpointer, self.judge = last_good, checkpointer, judge
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

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; a run of one step has no share of steps to warm up in, in which its rate would be 0."""
        if num_training_steps == 1 and self.args.warmup_steps < 1:
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return super()._get_train_sampler(*args, **kwargs) if self.train_sampler is None else self.train_sampler

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own, with AdaLoRA's part of it."""
        counted = self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None
        # A loss over all tokens of a step adds up over its batches; others Trainer divides by their number.
        adds_up = counted or self.compute_loss_func is not None
        batches = getattr(self, "current_gradient_accumulation_steps", 1) if adds_up else 1
        # Trainer multiplies a loss over the tokens of all processes by their number, for their gradients are averaged.
        factor = self.args.world_size if counted and self.args.average_tokens_across_devices else 1
        compute = super().compute_loss
        return with_penalty(self.model, 1 / batches, lambda: compute(model, inputs, *args, **kwargs), factor)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Trainer's own, between backward and update; raises TrainingError if loss or gradient are no numbers."""
        norm: Any = super()._clip_grad_norm(model)
        self.last_good.check(self._tr_loss, norm, self.args, self.state)
        return norm

    def floating_point_ops(self, inputs: Any) -> int:
        """0: nothing shows them, and Trainer would count all parameters anew for each batch."""
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Trainer's own, which counts padding where there is no attention mask, as in packed rows."""
        if inputs is self._filled_up and (own := self._own_rows(inputs)) is not None:
            inputs = {name: value[:own] if torch.is_tensor(value) else value for name, value in inputs.items()}
        if "attention_mask" in inputs or "position_ids" not in inputs:
            super()._track_num_input_tokens(inputs)
        else:
            tokens = torch.tensor(count_packed(inputs["position_ids"]), device=self.args.device)
            self.state.num_input_tokens_seen += int(self.accelerator.gather(tokens).sum())

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own, with the judge's scores."""
        output = super().evaluation_loop(*args, **kwargs)
        if self.judge is not None:
            metrics = output.metrics or {}
            # GPUs may differ in the last digits, and all processes must come to the same best step.
            scores = from_main(dict(self.judge(self.model)))
            metrics |= {f"eval_{name}": value for name, value in scores.items()}
        return output


@dataclass(frozen=True)
class TrainerSpec:
    """How a task is trained.

    Attributes:
        trainer: makes the Trainer, as `AnswerTrainer` is made.
        arguments: the class of the Trainer's arguments.
        preserving: a context around the training, which undoes what the Trainer changes in a model.
        share_of_rate: of a method's own learning rate, where the settings give none.
    """

    trainer: Callable[..., AnswerTrainer]
    arguments: Callable[..., TrainingArguments] = TrainingArguments
    preserving: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    share_of_rate: float = 1.0


def supervised(objective: Objective) -> TrainerSpec:
    """Examples with their labels, learned by transformers' own Trainer."""
    return TrainerSpec(
        functools.partial(AnswerTrainer, data_collator=objective.collate, compute_loss_func=objective.loss)
    )
