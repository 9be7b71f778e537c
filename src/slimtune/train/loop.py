"""One training run, in place: of a model whose trainable parameters are set, on encoded examples."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, TrainerState

from slimtune.data.batches import Objective, PadRight, pad_id_of
from slimtune.errors import TrainingError
from slimtune.models.short_attention import short_attention
from slimtune.recipe.method import FullTuning
from slimtune.recipe.optimizers import OFFLOADED
from slimtune.recipe.training import TrainSettings
from slimtune.train.arguments import arguments, check_device, check_settings, run_identity, use_one_gpu
from slimtune.train.checkpointing import (
    LOSS_LOG,
    PROGRESS,
    SAMPLES_LOG,
    TRAINER_STATE,
    BestCheckpoint,
    Checkpoint,
    Checkpointer,
    last_whole,
)
from slimtune.train.checks import DivergedError, EachDeltaLearns, InterruptedRunError, LastGood, StopOnSignal
from slimtune.train.optimizer import OffloadedAdamW
from slimtune.train.processes import is_lost_connection, lost, place_of, share_of, start
from slimtune.train.progress import SCORES, LossLog, ProgressBar, ProgressFile, ReproducibilityCheck, Samples
from slimtune.train.sharing import group_prefixes, sharing
from slimtune.train.state import load_trained_state
from slimtune.train.trainer import AnswerTrainer, TrainerSpec, supervised


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run."""

    steps: int
    tokens: int
    seconds: float
    final_loss: float
    eval_loss: float | None
    scores: dict[str, float] = field(default_factory=dict)
    """What the tuned model reaches on held-out examples, where they have one right answer."""
    best_step: int | None = None
    """The step whose weights these are, where the best were kept; `eval_loss` is theirs."""

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
    spec: TrainerSpec | None = None,
    judge: Callable[[Any], Mapping[str, float]] | None = None,
    resume: bool = False,
) -> Outcome:
    """Train in place, with `loss.jsonl`, `samples.jsonl` and the checkpoints in `folder`, which outlives a kill.

    With `resume` the run that was broken off in `folder` goes on from its last whole checkpoint, on a model that was
    made as the first one was. On the CPU it ends with the same bits as if it had not been broken off.

    Each of several processes calls it alike, with a console that is quiet in all but the first. They share the examples
    of each step, so that the losses are those of one process.

    Args:
        objective: how examples become a batch and a batch a loss; the answers of texts if it isn't given.
        spec: for training that isn't by examples with labels.
        autocast: compute in bf16 over weights that are held in float32, as tuning all of them wants.
        judge: scores on the held-out examples, for `keep_best`.

    Raises:
        TrainingError: nothing can be trained, nothing moves, the disk is full, or the loss is no longer a number: the
            weights are then those of the last good step, or of the last checkpoint where a copy would double a model.
        InterruptedRunError: Ctrl-C or SIGTERM; a checkpoint is written.
        OutputExistsError: a run was begun in `folder`, and `resume` is off.
        ConfigError, MissingDependencyError: settings that can't run here, or aren't those of the checkpoint.
    """
    device = check_device(place_of(model))
    check_settings(settings, device, eval_examples)
    process = start(device)
    if spec is None:
        objective = objective or Objective(PadRight(pad_id_of(tokenizer)))
        spec = supervised(objective)
    rate = settings.learning_rate or default_learning_rate(model) * spec.share_of_rate

    def log(line: str) -> None:
        console.print(f"[yellow]{escape(line)}[/]")

    # Taken before the first step: a resumed run must begin from the same weights and examples.
    best = BestCheckpoint(settings.best_by, settings.early_stopping_patience)
    identity = run_identity(model, examples, eval_examples, settings, rate, autocast)
    checkpointer = Checkpointer(folder, settings, identity, best, log)
    checkpoint = checkpointer.open(resume)
    stop, bar = StopOnSignal(log), ProgressBar(console)
    samples = (
        [Samples(eval_examples, settings.samples, tokenizer, folder / SAMPLES_LOG, console, process.is_main)]
        if settings.samples
        else []
    )
    with _key_value_cache_kept(model), _checkpointed(model, settings.gradient_checkpointing), spec.preserving(model):
        args = arguments(spec, share_of(settings), rate, device, folder, examples, bool(eval_examples), autocast)
        trainer = spec.trainer(
            model=model,
            args=use_one_gpu(args, log),
            train_dataset=examples,
            eval_dataset=eval_examples or None,
            last_good=LastGood(model, has_copy=is_adopted(model)),
            checkpointer=checkpointer,
            judge=judge if settings.best_by not in (None, "loss") else None,
            lora_plus_ratio=settings.lora_plus_ratio,
            optimizer_cls_and_kwargs=(OffloadedAdamW, {"lr": rate}) if settings.optim == OFFLOADED else None,
            callbacks=[
                # The log before the checkpoints, which copy its file.
                EachDeltaLearns(model, lambda line: log(f"warning: {line}")),
                LossLog(folder / LOSS_LOG, process.is_main),
                ProgressFile(folder / PROGRESS, process.is_main),
                ReproducibilityCheck(checkpointer.earlier_losses, 0.0 if device == "cpu" else 1e-3, log),
                bar,
                *samples,
                best,
                checkpointer,
                stop,
            ],
        )
        # It would print each logged line as a dictionary beside the bar.
        trainer.remove_callback(PrinterCallback)
        groups = group_prefixes(trainer, settings)
        with stop.listening():
            try:
                if process.rank:
                    # Each draws dropout masks of its own; the first one's are those of a run that is alone.
                    set_seed(settings.seed + process.rank)
                # The Trainer's, since TRL's encodes its examples itself.
                dataset, collate = trainer.train_dataset, trainer.data_collator
                with short_attention(), sharing(model, share_of(settings), dataset, collate, console, groups):
                    _train(trainer, checkpointer, checkpoint)
            finally:
                bar.close()
    _check_interrupted(trainer, stop, checkpointer)
    return _outcome(trainer, checkpointer)


def is_adopted(model: Any) -> bool:
    """Whether the model carries adapters, so that training changes them alone."""
    return bool(getattr(model, "peft_config", None))


def default_learning_rate(model: Any) -> float:
    """The learning rate of the method that the model is tuned with, where the settings give none."""
    return model.active_peft_config.learning_rate if is_adopted(model) else FullTuning.learning_rate


def _train(trainer: AnswerTrainer, checkpointer: Checkpointer, checkpoint: Checkpoint | None) -> None:
    """Train to the last step, unless the checkpoint is of that step. Raises: TrainingError."""
    # A run that was killed after its last step, while it was evaluated or written: Trainer would take a step more.
    if checkpoint is not None and checkpointer.facts["finished"]:
        load_trained_state(trainer.model, checkpointer.weights_at(checkpoint.step))
        trainer.state = TrainerState.load_from_json(str(checkpoint.path / TRAINER_STATE))
        return
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    except DivergedError as error:
        # A full tuning has no copy of the last good weights, which would double the model: its checkpoint takes over.
        last = None if error.kept_steps else last_whole(checkpointer.folder)
        if last is None:
            raise
        load_trained_state(trainer.model, checkpointer.weights_at(last.step))
        raise DivergedError(str(error), last.step) from error
    except OSError as error:
        # Of a full disk the user can be helped; any other error of the system is a bug to be seen whole.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise TrainingError(
            f"step {trainer.state.global_step} was not written down: {error}; make room and go on with --resume"
        ) from error
    except RuntimeError as error:
        if is_lost_connection(error):
            raise lost() from error
        raise


def _check_interrupted(trainer: AnswerTrainer, stop: StopOnSignal, checkpointer: Checkpointer) -> None:
    """Raises: InterruptedRunError, where a signal ended the run before its end."""
    # A signal in the last step has come too late to stop anything.
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if stop.received is not None and step < steps and not checkpointer.best.is_exhausted:
        raise InterruptedRunError(
            f"stopped by {signal.Signals(stop.received).name} after step {step} of {steps}, with a checkpoint in "
            f"{checkpointer.folder}; go on with the same command and --resume",
            stop.received,
        )


def _outcome(trainer: AnswerTrainer, checkpointer: Checkpointer) -> Outcome:
    """The outcome of the run; restores the best weights where they were kept."""
    best, history = checkpointer.best.step, trainer.state.log_history
    if best is not None and best != trainer.state.global_step:
        load_trained_state(trainer.model, checkpointer.weights_at(best))
    # Of the best step where one was kept: the last evaluation is of weights that are gone.
    evaluated = [entry for entry in history if "eval_loss" in entry and best in (None, entry["step"])]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    last = evaluated[-1] if evaluated else {}
    return Outcome(
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=checkpointer.seconds,
        final_loss=losses[-1] if losses else float("nan"),
        eval_loss=last.get("eval_loss"),
        scores={name: last[f"eval_{name}"] for name in SCORES if f"eval_{name}" in last},
        best_step=best,
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
def _checkpointed(model: Any, wanted: bool) -> Iterator[None]:
    # Called on the model itself, for the arguments of Trainer change their names between versions.
    if wanted:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if wanted:
            model.gradient_checkpointing_disable()
