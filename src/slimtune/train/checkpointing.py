"""Checkpointing: when a checkpoint is due, how it is written whole or not at all, and how a run resumes from one.

    checkpoint-N/manifest.json        checksums of all its files; without it the checkpoint doesn't count
    checkpoint-N/weights.*            the tensors that training changes (`train.state.trained_state`)
    checkpoint-N/training.*           optimizer, scheduler, random generators (`train.state.training_state`)
    checkpoint-N/trainer_state.json   transformers' own record of steps and losses
    checkpoint-N/facts.json           whose checkpoint it is, how far the run is, which step was best
    checkpoint-N/loss.jsonl           the logs so far

It is filled under another name, synced to the disk and then renamed, so that a kill at any moment leaves either a whole
checkpoint or none. On the CPU a resumed run ends with the same bits as one that was never broken off.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from slimtune.console.process import this_process
from slimtune.errors import ConfigError, OutputExistsError, TrainingError, did_you_mean, listing
from slimtune.recipe.training import TrainSettings
from slimtune.storage.atomic import sync
from slimtune.storage.tensor_tree import read_tree, write_tree
from slimtune.train.processes import from_main, largest, of_all
from slimtune.train.state import environment, trained_state, training_state

LOSS_LOG, SAMPLES_LOG = LOGS = ("loss.jsonl", "samples.jsonl")
"""What a run writes line by line; a checkpoint holds it as far as it goes."""
PROGRESS = "progress.json"
"""How far a run is, for whoever looks on; it ends with the run."""
WEIGHTS, TRAINING, FACTS = "weights", "training", "facts.json"
TRAINER_STATE = "trainer_state.json"
MANIFEST = "manifest.json"
FORMAT = 1
_PARTIAL = ".partial"

MAY_CHANGE = ("save_steps", "save_minutes", "save_total_limit", "report_to", "dataloader_workers")
"""Settings of training that leave the numbers of a run as they are."""
LOWER_IS_BETTER = ("loss", "perplexity")
_WORTH_SAVING_SECONDS = 60.0


class BestCheckpoint(TrainerCallback):
    """Has a checkpoint written at each evaluation that is better than all before.

    Args:
        by: the score, as the evaluation names it without `eval_`; None tracks nothing.
        patience: stop after so many evaluations that weren't better.
    """

    def __init__(self, by: str | None, patience: int | None) -> None:
        self.by, self.patience = by, patience
        self.step: int | None = None
        self.value: float | None = None
        self.waited = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether no better score came for too long."""
        return self.patience is not None and self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"step": self.step, "value": self.value, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.step, self.value, self.waited = state["step"], state["value"], state["waited"]

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Compare; raises TrainingError if the evaluation gives no such score."""
        if self.by is None:
            return
        metrics = metrics or {}
        if f"eval_{self.by}" not in metrics:
            scores = [n for n in metrics if n.startswith("eval_") and not n.endswith(("_second", "_runtime"))]
            names = [name.removeprefix("eval_") for name in scores]
            near = did_you_mean(self.by, names)
            raise TrainingError(f"keep_best asks for '{self.by}', and the evaluation gives {listing(names)}{near}")
        value = float(metrics[f"eval_{self.by}"])
        # Trainer saves after all callbacks of the evaluation, so the checkpoint is of the weights that were scored.
        if self._is_better(value):
            self.step, self.value, self.waited = state.global_step, value, 0
            control.should_save = True
            return
        self.waited += 1
        if self.is_exhausted:
            control.should_training_stop = control.should_save = True

    def _is_better(self, value: float) -> bool:
        if self.value is None:
            return value == value  # NaN is not the best.
        return value < self.value if self.by in LOWER_IS_BETTER else value > self.value


class Checkpointer(TrainerCallback):
    """Decides when a checkpoint is due, writes it, and finds the one to resume from.

    Args:
        folder: of the run.
        identity: what must be the same for a run to go on, as values by what they are about.
        log: shows a line to the user.

    Attributes:
        writes: whether this is the process that writes.
    """

    def __init__(
        self,
        folder: Path,
        settings: TrainSettings,
        identity: Mapping[str, Any],
        best: BestCheckpoint,
        log: Callable[[str], None],
    ) -> None:
        self.folder, self.settings, self.identity, self.best, self.log = folder, settings, dict(identity), best, log
        self.writes = this_process().is_main
        self.resumed_from: Checkpoint | None = None
        self.facts: dict[str, Any] = {"seconds": 0.0, "finished": False}
        self.earlier_losses: dict[int, float] = {}
        self.began = self.saved_at = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the run has trained, all its sessions together."""
        return self.facts["seconds"] + time.monotonic() - self.began

    def open(self, resume: bool) -> Checkpoint | None:
        """Find the checkpoint to resume from; None if the run starts at its beginning.

        Raises:
            OutputExistsError: a run was begun here, and `resume` is off.
            ConfigError: the checkpoint is of another run.
        """
        # Checksums of all files are computed here, once for a run.
        checkpoint = from_main(last_whole(self.folder, self.log) if self.writes else None)
        if checkpoint and not resume:
            raise OutputExistsError(
                f"{self.folder} holds a run that was broken off, with a checkpoint of step {checkpoint.step}; pass "
                "--resume to go on with it, or --overwrite to begin anew"
            )
        # Read before the file is replaced: a resumed run is compared with the losses beyond its checkpoint.
        self.earlier_losses = _read_losses(self.folder / LOSS_LOG)
        if self.writes:
            for name in LOGS:
                (self.folder / name).unlink(missing_ok=True)
        if checkpoint:
            self._resume_from(checkpoint)
        elif resume:
            self.log("there is no whole checkpoint yet: the run starts at its beginning")
        self.began = self.saved_at = time.monotonic()
        return checkpoint

    def _resume_from(self, checkpoint: Checkpoint) -> None:
        if not checkpoint.path.is_dir():
            raise TrainingError(
                f"this process doesn't see {checkpoint.path}, which the first one wrote; the output must be on a disk "
                "that all machines of the run share"
            )
        self.facts = json.loads((checkpoint.path / FACTS).read_text(encoding="utf-8"))
        if self.writes:
            check_same_run(self.folder, self.facts["identity"], self.identity)
            _copy_logs(checkpoint.path, self.folder)
        self.best.load_state_dict(self.facts["best"])
        then, now = {"processes": 1} | self.facts["environment"], environment()
        if then != now:
            changed = ", ".join(f"{k} {then.get(k)} then, {v} now" for k, v in now.items() if then.get(k) != v)
            self.log(
                f"warning: another environment than that of the checkpoint ({changed}); the last digits may differ"
            )
        self.resumed_from = checkpoint
        self.log(f"going on after step {checkpoint.step}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of the checkpoints."""
        self.saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Request a checkpoint when it is due; at the end, if a kill would lose more than a minute."""
        # By the clock unless told otherwise: a step may take a millisecond or a minute.
        waited, settings = time.monotonic() - self.saved_at, self.settings
        if settings.save_steps:
            due = state.global_step % settings.save_steps == 0
        else:
            due = bool(settings.save_minutes) and waited >= settings.save_minutes * 60
        due |= state.global_step >= state.max_steps and waited > _WORTH_SAVING_SECONDS
        # Clocks differ: what is due in one process is due in all.
        control.should_save |= bool(largest(due))

    def save(self, trainer: Any) -> None:
        """Write a checkpoint of a Trainer between two steps, in all processes at once. Raises: TrainingError."""
        state = trainer.state
        losses = of_all(trainer._tr_loss.item())
        facts = {
            "identity": self.identity,
            "environment": environment(),
            # Summed over sessions: throughput is of the whole run.
            "seconds": self.seconds,
            "finished": state.global_step >= state.max_steps or self.best.is_exhausted,
            "best": self.best.state_dict(),
            # What is summed up for the next line of the log.
            "loss_since_logged": sum(losses) / len(losses),
            "losses_since_logged": losses,
            "last_logged": trainer._globalstep_last_logged,
        }
        # Gathered from all of them, before one of them writes.
        weights, training = trained_state(trainer.model), training_state(trainer)
        self.saved_at = time.monotonic()
        if not self.writes:
            return

        def fill(folder: Path) -> None:
            write_tree(folder, WEIGHTS, weights)
            write_tree(folder, TRAINING, training)
            state.save_to_json(str(folder / TRAINER_STATE))
            (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
            _copy_logs(self.folder, folder)

        # Rotated once the new one is whole, so that there is room for one more than the limit, and never none.
        write_checkpoint(self.folder, state.global_step, fill)
        rotate(self.folder, self.settings.save_total_limit, best_step_of)
        self.saved_at = time.monotonic()

    def weights_at(self, step: int) -> Any:
        """The trained state of a step that has a checkpoint. Raises: TrainingError, if it is broken."""
        checkpoint = Checkpoint(self.folder / f"checkpoint-{step}", step)
        fault = fault_of(checkpoint)
        if fault:
            raise TrainingError(
                f"the weights of step {step} can't be read: {fault}; go on with --resume, or begin anew"
            )
        return read_tree(checkpoint.path, WEIGHTS)


_DEFAULTS = {f"training.{field.name}": field.default for field in fields(TrainSettings) if field.default is not MISSING}


def check_same_run(
    folder: Path, then: Mapping[str, Any], now: Mapping[str, Any], may_change: Collection[str] = ()
) -> None:
    """Raises: ConfigError, with the keys that differ between the run in `folder` and the one that is to go on."""
    # A run of an earlier version knew fewer settings, and did what their defaults say.
    then = {name: default for name, default in _DEFAULTS.items() if name in now} | dict(then)
    names = sorted(n for n in then.keys() | now.keys() if n not in may_change and then.get(n) != now.get(n))
    if not names:
        return
    shown = [f"{name} was {then.get(name)!r:.60} and is {now.get(name)!r:.60}" for name in names]
    differing = ", ".join(shown) if len(names) <= 4 else listing(names, 4)
    raise ConfigError(
        f"the run in {folder} was begun with another recipe: {differing}; resume with the same, or begin anew with "
        "--overwrite"
    )


def best_step_of(checkpoint: Checkpoint) -> Iterable[int]:
    """The step whose weights a run would need that resumes from a checkpoint."""
    try:
        step = json.loads((checkpoint.path / FACTS).read_text(encoding="utf-8"))["best"]["step"]
    except (OSError, ValueError, KeyError):
        return ()
    return () if step is None else (step,)


def _copy_logs(source: Path, target: Path) -> None:
    for name in LOGS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _read_losses(path: Path) -> dict[int, float]:
    """The losses by step that a run wrote before it was broken off, the last line perhaps in the middle."""
    losses = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            # A kill came in the middle of this line.
            continue
        if "loss" in entry:
            losses[entry["step"]] = entry["loss"]
    return losses


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: the state after `step` optimizer steps."""

    path: Path
    step: int


def write_checkpoint(folder: Path, step: int, fill: Callable[[Path], None]) -> Checkpoint:
    """Let `fill` write files into a new checkpoint, which is there once all of them are whole.

    Raises: TrainingError, where the disk doesn't take it; those before are unharmed.
    """
    from safetensors import SafetensorError

    # The name is Trainer's, which reads the step from it.
    path = folder / f"checkpoint-{step}"
    partial = path.with_name(path.name + _PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        _seal(partial, step)
        # One of that step may be there already, where it was passed over as broken.
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        # The rename is in the folder's own data: without this a power failure may undo it.
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        before = last_whole(folder)
        left = f"that of step {before.step} is whole, in {before.path}" if before else "there is none before it"
        raise TrainingError(
            f"the checkpoint of step {step} was not written: {error}; {left}; make room and go on with --resume"
        ) from error
    return Checkpoint(path, step)


def last_whole(folder: Path, log: Callable[[str], None] = lambda line: None) -> Checkpoint | None:
    """The newest checkpoint that is whole; `log` gets a line for each newer one that is not."""
    for checkpoint in _checkpoints(folder):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint
        log(f"{checkpoint.path.name} is passed over: {fault}")
    return None


def fault_of(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint, by the checksums in its manifest; None where it is whole."""
    # Anything may be wrong with a file that a kill or a disk has damaged, and all of it means the same.
    try:
        manifest = json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, and this version reads {FORMAT}"
        for name, expected in manifest["sha256"].items():
            if _checksum(checkpoint.path / name) != expected:
                return f"{name} doesn't match its checksum"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def rotate(folder: Path, limit: int, needed: Callable[[Checkpoint], Iterable[int]]) -> None:
    """Remove all but the newest `limit` checkpoints and those of the steps that these need, and what kills left."""
    checkpoints = _checkpoints(folder)
    # The best step's checkpoint may be older than all that are kept.
    needed_steps = {step for checkpoint in checkpoints[:limit] for step in needed(checkpoint)}
    for old in checkpoints[limit:]:
        if old.step not in needed_steps:
            # Under another name first: a kill in the middle must not leave half a checkpoint under a good name.
            doomed = old.path.with_name(old.path.name + _PARTIAL)
            with contextlib.suppress(OSError):
                old.path.rename(doomed)
    for left in folder.glob(f"checkpoint-*{_PARTIAL}"):
        shutil.rmtree(left, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Checkpoint]:
    """All checkpoints by their names, the newest first; whether they are whole isn't looked at."""
    matches = ((path, re.fullmatch(r"checkpoint-(\d+)", path.name)) for path in folder.glob("checkpoint-*"))
    checkpoints = [Checkpoint(path, int(match[1])) for path, match in matches if match]
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.step, reverse=True)


def _seal(folder: Path, step: int) -> None:
    """Sync all files and write the manifest."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    # On the disk before the manifest is, or a power failure could leave a manifest of files that never got there.
    for path in files:
        sync(path)
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "sha256": {p.name: _checksum(p) for p in files}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
