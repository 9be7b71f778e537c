"""One training run: a model whose trainable parameters are chosen, encoded examples, settings."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from slimtune.data.batches import Objective, PadRight
from slimtune.evaluate.generation import pad_id_of
from slimtune.train.checks import EachDeltaLearns, LastGood
from slimtune.train.method import FullTuning
from slimtune.train.offload import OffloadedAdamW
from slimtune.train.optimizer import DEFAULT, OFFLOADED, check_runs
from slimtune.train.progress import LossFile, ShownProgress
from slimtune.train.settings import TrainSettings
from slimtune.train.trackers import check_installed
from slimtune.train.trainer import AnswerTrainer, Kind, supervised


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    steps: int
    tokens: int
    seconds: float
    final_loss: float
    eval_loss: float | None
    interrupted: bool
    scores: dict[str, float] = field(default_factory=dict)
    """What the tuned model reaches on held-out examples, where they have one right answer."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens read per second, padding not counted."""
        return self.tokens / self.seconds


def fine_tune(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Any],
    settings: TrainSettings,
    folder: Path,
    console: Console,
    eval_examples: Sequence[Any] = (),
    autocast: bool = False,
    objective: Objective | None = None,
    kind: Kind | None = None,
) -> Outcome:
    """Train in place, with `loss.jsonl` in `folder`; Ctrl-C ends it early and keeps what was learned.

    `objective` says how examples become a batch and a batch a loss, the answers of texts if it isn't given; `kind` is
    for training that isn't by examples with labels. `autocast` computes in bf16 over weights that are held in float32,
    as tuning all of them wants.

    Raises TrainingError if nothing can be trained, nothing moves, or the loss is no longer a number: the weights are
    then those of the last good step, except where a copy would double a whole model. Raises ConfigError or
    MissingDependencyError for an optimizer that can't run here.
    """
    check_runs(settings.optim, model.device.type)
    check_installed(settings.trackers)
    kind = kind or supervised(objective or Objective(PadRight(pad_id_of(tokenizer))))
    rate = settings.learning_rate or own_rate(model) * kind.share_of_rate
    offloaded = (OffloadedAdamW, {"lr": rate}) if settings.optim == OFFLOADED else None
    bar = ShownProgress(console)
    with _key_value_cache_kept(model), _checkpointing(model, settings.gradient_checkpointing), kind.keeping(model):
        trainer = kind.trainer(
            model=model,
            args=_arguments(kind, settings, rate, model.device.type, folder, bool(eval_examples), autocast),
            train_dataset=examples,
            eval_dataset=eval_examples or None,
            last_good=LastGood(model, has_copy=is_adopted(model)),
            lora_plus_ratio=settings.lora_plus_ratio,
            optimizer_cls_and_kwargs=offloaded,
            callbacks=[
                EachDeltaLearns(model, lambda what: console.print(f"[yellow]warning:[/] {what}")),
                LossFile(folder / "loss.jsonl"),
                bar,
            ],
        )
        trainer.remove_callback(PrinterCallback)
        began = time.monotonic()
        try:
            trainer.train()
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
        finally:
            bar.close()
    return _outcome(trainer, time.monotonic() - began, interrupted)


def is_adopted(model: Any) -> bool:
    """Whether the model carries adapters, so that training changes them alone."""
    return bool(getattr(model, "peft_config", None))


def own_rate(model: Any) -> float:
    """The learning rate of the method that the model is tuned with, where the settings give none."""
    return model.active_peft_config.learning_rate if is_adopted(model) else FullTuning.learning_rate


def _arguments(
    kind: Kind, settings: TrainSettings, rate: float, device: str, folder: Path, evaluates: bool, autocast: bool
) -> TrainingArguments:
    return kind.arguments(
        output_dir=str(folder),
        learning_rate=rate,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        optim=DEFAULT if settings.optim == OFFLOADED else settings.optim,
        lr_scheduler_type=settings.scheduler,
        lr_scheduler_kwargs=dict(settings.scheduler_options),
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_num_workers=settings.dataloader_workers,
        bf16=autocast,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        eval_strategy="epoch" if evaluates else "no",
        prediction_loss_only=True,
        save_strategy="no",
        logging_steps=settings.logging_steps,
        # The filter would put the mean in place of a loss that is not a number.
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=list(settings.trackers) or "none",
        disable_tqdm=True,
    )


def _outcome(trainer: AnswerTrainer, seconds: float, interrupted: bool) -> Outcome:
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return Outcome(
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=seconds,
        final_loss=losses[-1] if losses else float("nan"),
        eval_loss=evaluated[-1] if evaluated else None,
        interrupted=interrupted,
    )


@contextmanager
def _key_value_cache_kept(model: Any) -> Iterator[None]:
    # Trainer switches the cache off in the model's configuration for good, and generation would crawl afterwards.
    before = getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        model.config.use_cache = before


@contextmanager
def _checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    # Called on the model itself, for the arguments of Trainer change their names between versions.
    if wanted:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if wanted:
            model.gradient_checkpointing_disable()
