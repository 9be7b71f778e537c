"""The settings of a run: checked before it starts, as arguments of transformers' Trainer, and as its identity."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler

from slimtune.console.process import this_process
from slimtune.errors import ConfigError, listing
from slimtune.recipe.optimizers import DEFAULT, OFFLOADED, check_runs
from slimtune.recipe.training import TrainSettings, check_installed
from slimtune.train.checkpointing import MAY_CHANGE
from slimtune.train.processes import check_processes
from slimtune.train.state import fingerprint_of_base, fingerprint_of_examples
from slimtune.train.trainer import TrainerSpec


def check_settings(settings: TrainSettings, device: str, held_out: Sequence[Any]) -> None:
    """See that a run with these settings can start. Raises: ConfigError, MissingDependencyError, TrainingError."""
    check_processes(device, settings)
    check_runs(settings.optim, device)
    check_installed(settings.trackers)
    if settings.of_held_out and not held_out:
        raise ConfigError(
            f"{listing(settings.of_held_out)} look at held-out examples, and there are none; hold some out with "
            "data.held_out, or leave it out"
        )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        get_scheduler(settings.scheduler, optimizer, 1, 10, dict(settings.scheduler_options))
    except (TypeError, ValueError) as error:
        given = f"scheduler_options {dict(settings.scheduler_options)}" if settings.scheduler_options else "no options"
        raise ConfigError(f"the scheduler {settings.scheduler} doesn't run with {given}: {error}") from error


def check_device(device: str) -> str:
    """The kind of a device that can train, such as "cuda". Raises: ConfigError, for a GPU but the first visible one.

    Of several processes each has the GPU of its own number.
    """
    kind, _, number = device.partition(":")
    if kind == "cuda" and number not in ("", str(this_process().local_rank)):
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        its_name = named[int(number)] if int(number) < len(named) else number
        raise ConfigError(
            f"transformers' Trainer takes the first GPU that is visible, not {device}; set "
            f"CUDA_VISIBLE_DEVICES={its_name or number} and pass cuda"
        )
    return kind


def arguments(
    spec: TrainerSpec,
    settings: TrainSettings,
    rate: float,
    device: str,
    folder: Path,
    examples: Any,
    evaluates: bool,
    autocast: bool,
) -> TrainingArguments:
    """The settings as arguments of the Trainer.

    Args:
        settings: with this process's share of a step (`train.processes.share_of`).
    """
    return spec.arguments(
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
        # By steps, so that a checkpoint is written after the evaluation of its step and not before.
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_steps or _steps_of_epoch(settings, examples),
        # Each process reads a stream and takes its batches: one that reads for all would need them of one length.
        accelerator_config={"dispatch_batches": False},
        # Trainer's word is no where activations are checkpointed, which holds for reentrant checkpoints alone.
        ddp_find_unused_parameters=True,
        prediction_loss_only=True,
        # A Checkpointer says when.
        save_strategy="no",
        restore_callback_states_from_checkpoint=False,
        logging_steps=settings.logging_steps,
        # The filter would put the mean in place of a loss that is not a number.
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=list(settings.trackers) or "none",
        disable_tqdm=True,
    )


def _steps_of_epoch(settings: TrainSettings, examples: Any) -> int:
    """The optimizer steps of an epoch; of a stream, whose length isn't known, all of them."""
    if not hasattr(examples, "__len__"):
        return settings.max_steps or 1
    examples_of_step = settings.batch_size * settings.gradient_accumulation * this_process().count
    return math.ceil(len(examples) / examples_of_step)


def use_one_gpu(arguments: Any, log: Callable[[str], None]) -> Any:
    """The arguments of a Trainer with one GPU: it would copy the model to all that are visible, at each step anew.

    A batch would then be as many times larger as there are GPUs, without a word.
    """
    if arguments.n_gpu > 1:
        log(f"{arguments.n_gpu} GPUs are visible, of which {arguments.device} trains; CUDA_VISIBLE_DEVICES chooses")
        arguments._n_gpu = 1
    return arguments


def run_identity(
    model: Any, examples: Any, held_out: Any, settings: TrainSettings, rate: float, autocast: bool
) -> dict[str, Any]:
    """What must be the same for a run to resume, as values by what they are about, in JSON's types."""
    values = {f"training.{name}": v for name, v in asdict(settings).items() if name not in MAY_CHANGE}
    for adapter, config in getattr(model, "peft_config", {}).items():
        values |= {
            f"method.{name}" + f" of {adapter}" * (adapter != "default"): v for name, v in config.to_dict().items()
        }
    values |= {
        "training.learning_rate": rate,
        "autocast": autocast,
        "the base's weights": fingerprint_of_base(model),
        "the examples": fingerprint_of_examples(examples),
        "the held-out examples": fingerprint_of_examples(held_out),
    }
    return json.loads(json.dumps(values))
