"""What is kept of a run while it goes on: when a checkpoint is due, what is in it, how a run goes on from one."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from slimtune.errors import OutputExistsError, TrainingError
from slimtune.storage.tree import read_tree, write_tree
from slimtune.train.best import Best
from slimtune.train.checkpoint import LOGS, Checkpoint, fault_of, last_whole, rotate, write_checkpoint
from slimtune.train.same import refuse_other
from slimtune.train.settings import TrainSettings
from slimtune.train.state import random_state, weights_of

WEIGHTS, TRAINING, FACTS = "weights", "training", "facts.json"
TRAINER_STATE = "trainer_state.json"
_WORTH_SAVING_SECONDS = 60.0


class Keeper(TrainerCallback):
    """Keeps the checkpoints of the run in `folder`.

    Args:
        identity: what must be the same for a run to go on, as texts by what they are about.
        say: told what a user should know.
    """

    def __init__(
        self, folder: Path, settings: TrainSettings, identity: Mapping[str, Any], best: Best, say: Callable[[str], None]
    ) -> None:
        self.folder, self.settings, self.identity, self.best, self.say = folder, settings, dict(identity), best, say
        self.start: Checkpoint | None = None
        self.facts: dict[str, Any] = {"seconds": 0.0, "finished": False}
        self.seen_before: dict[int, float] = {}
        self.began = self.saved_at = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the run has trained, all its sessions together."""
        return self.facts["seconds"] + time.monotonic() - self.began

    def open(self, resume: bool) -> Checkpoint | None:
        """Find the checkpoint to go on from; None if the run starts at its beginning.

        Raises:
            OutputExistsError: a run was begun here, and `resume` is off.
            ConfigError: the checkpoint is of another run.
        """
        found = last_whole(self.folder, self.say)
        if found and not resume:
            raise OutputExistsError(
                f"{self.folder} holds a run that was broken off, with a checkpoint of step {found.step}; pass --resume "
                "to go on with it, or --overwrite to begin anew"
            )
        self.seen_before = _losses(self.folder / LOGS[0])
        for name in LOGS:
            (self.folder / name).unlink(missing_ok=True)
        if found:
            self._go_on_from(found)
        elif resume:
            self.say("there is no whole checkpoint yet: the run starts at its beginning")
        self.began = self.saved_at = time.monotonic()
        return found

    def _go_on_from(self, found: Checkpoint) -> None:
        self.facts = json.loads((found.path / FACTS).read_text(encoding="utf-8"))
        refuse_other(self.folder, self.facts["identity"], self.identity)
        for name in LOGS:
            if (found.path / name).is_file():
                shutil.copyfile(found.path / name, self.folder / name)
        self.best.restore(self.facts["best"])
        there, here = self.facts["environment"], environment()
        if there != here:
            changed = ", ".join(f"{k} {there.get(k)} then, {v} now" for k, v in here.items() if there.get(k) != v)
            self.say(
                f"warning: another environment than that of the checkpoint ({changed}); the last digits may differ"
            )
        self.start = found
        self.say(f"going on after step {found.step}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of the checkpoints."""
        self.saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint when it is due; at the end, if a kill would lose more than a minute."""
        waited, settings = time.monotonic() - self.saved_at, self.settings
        if settings.save_steps:
            due = state.global_step % settings.save_steps == 0
        else:
            due = bool(settings.save_minutes) and waited >= settings.save_minutes * 60
        if due or (state.global_step >= state.max_steps and waited > _WORTH_SAVING_SECONDS):
            control.should_save = True

    def save(self, trainer: Any) -> None:
        """Write a checkpoint of a Trainer between two steps. Raises: TrainingError."""
        state = trainer.state
        facts = {
            "identity": self.identity,
            "environment": environment(),
            "seconds": self.seconds,
            "finished": state.global_step >= state.max_steps or self.best.is_exhausted,
            "best": self.best.facts(),
            # What is summed up for the next line of the log.
            "loss_since_logged": trainer._tr_loss.item(),
            "last_logged": trainer._globalstep_last_logged,
        }

        def fill(folder: Path) -> None:
            write_tree(folder, WEIGHTS, weights_of(trainer.model))
            write_tree(folder, TRAINING, training_state(trainer))
            state.save_to_json(str(folder / TRAINER_STATE))
            (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
            for name in LOGS:
                if (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, folder / name)

        write_checkpoint(self.folder, state.global_step, fill)
        rotate(self.folder, self.settings.save_total_limit, best_of)
        self.saved_at = time.monotonic()

    def weights_at(self, step: int) -> Any:
        """What was learned after a step of which there is a checkpoint. Raises: TrainingError, if it is broken."""
        checkpoint = Checkpoint(self.folder / f"checkpoint-{step}", step)
        fault = fault_of(checkpoint)
        if fault:
            raise TrainingError(
                f"the weights of step {step} can't be read: {fault}; go on with --resume, or begin anew"
            )
        return read_tree(checkpoint.path, WEIGHTS)


def training_state(trainer: Any) -> dict[str, Any]:
    """What a step goes by besides the weights."""
    return {
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "random": random_state(trainer.args.device),
    }


def environment() -> dict[str, Any]:
    """What may change the last digits of the numbers that a run computes."""
    found: dict[str, Any] = {name: version(name) for name in ("slimtune", "torch", "transformers")}
    return found | {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}


def best_of(checkpoint: Checkpoint) -> Iterable[int]:
    """The step whose weights a run would need that goes on from a checkpoint."""
    try:
        step = json.loads((checkpoint.path / FACTS).read_text(encoding="utf-8"))["best"]["step"]
    except (OSError, ValueError, KeyError):
        return ()
    return () if step is None else (step,)


def _losses(path: Path) -> dict[int, float]:
    """The losses that a run wrote before it was broken off, the last line perhaps in the middle."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "loss" in entry:
            found[entry["step"]] = entry["loss"]
    return found
