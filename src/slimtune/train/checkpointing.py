"""What is kept of a run while it goes on: when a checkpoint is due, what is in it, how a run goes on from one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import TrainerCallback

from slimtune.adapters.adapter import adopted_modules
from slimtune.core.delta import Delta, deltas_of
from slimtune.errors import BaseMismatchError, ConfigError, OutputExistsError, TrainingError, did_you_mean, listing
from slimtune.recipe.training import TrainSettings
from slimtune.storage.atomic import sync
from slimtune.storage.tensor_tree import read_tree, write_tree

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


MAY_CHANGE = ("save_steps", "save_minutes", "save_total_limit", "report_to", "dataloader_workers")
"""Settings of training that leave the numbers of a run as they are."""


def refuse_other(
    folder: Path, then: Mapping[str, Any], now: Mapping[str, Any], may_change: Collection[str] = ()
) -> None:
    """Raises: ConfigError, with the keys that differ between the run in `folder` and the one that is to go on."""
    names = sorted(n for n in then.keys() | now.keys() if n not in may_change and then.get(n) != now.get(n))
    if not names:
        return
    shown = [f"{name} was {then.get(name)!r:.60} and is {now.get(name)!r:.60}" for name in names]
    differing = ", ".join(shown) if len(names) <= 4 else listing(names, 4)
    raise ConfigError(
        f"the run in {folder} was begun with another recipe: {differing}; resume with the same, or begin anew with "
        "--overwrite"
    )


LOGS = ("loss.jsonl", "samples.jsonl")
"""What a run writes line by line; a checkpoint holds it as far as it goes."""
MANIFEST = "manifest.json"
FORMAT = 1
_PARTIAL = ".partial"


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
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        before = last_whole(folder)
        kept = f"that of step {before.step} is whole, in {before.path}" if before else "there is none before it"
        raise TrainingError(
            f"the checkpoint of step {step} was not written: {error}; {kept}; make room and go on with --resume"
        ) from error
    return Checkpoint(path, step)


def last_whole(folder: Path, passed_over: Callable[[str], None] = lambda what: None) -> Checkpoint | None:
    """The newest checkpoint that is whole; `passed_over` is told which newer ones are not, and why."""
    for checkpoint in _found(folder):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint
        passed_over(f"{checkpoint.path.name} is passed over: {fault}")
    return None


def fault_of(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint, by the checksums in its manifest; None where it is whole."""
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


def rotate(folder: Path, limit: int, needed: Callable[[Checkpoint], Iterable[int]] = lambda checkpoint: ()) -> None:
    """Remove all but the newest `limit` checkpoints and those of the steps that these need, and what kills left."""
    found = _found(folder)
    kept = {step for checkpoint in found[:limit] for step in needed(checkpoint)}
    for old in found[limit:]:
        if old.step not in kept:
            _remove(old.path)
    for left in folder.glob(f"checkpoint-*{_PARTIAL}"):
        shutil.rmtree(left, ignore_errors=True)


def _remove(path: Path) -> None:
    # Under another name first: a kill in the middle must not leave half a checkpoint under a good name.
    doomed = path.with_name(path.name + _PARTIAL)
    with contextlib.suppress(OSError):
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _found(folder: Path) -> list[Checkpoint]:
    matches = ((path, re.fullmatch(r"checkpoint-(\d+)", path.name)) for path in folder.glob("checkpoint-*"))
    found = [Checkpoint(path, int(match[1])) for path, match in matches if match]
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def _seal(folder: Path, step: int) -> None:
    """Sync all files and write the manifest."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        sync(path)
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "sha256": {p.name: _checksum(p) for p in files}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


LOWER_IS_BETTER = ("loss", "perplexity")


class Best(TrainerCallback):
    """Has a checkpoint written at each evaluation that is better than all before.

    Args:
        by: the score, as the evaluation names it without `eval_`; None keeps nothing.
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

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"step": self.step, "value": self.value, "waited": self.waited}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on from what `facts` gave."""
        self.step, self.value, self.waited = facts["step"], facts["value"], facts["waited"]

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Compare; raises TrainingError if the evaluation gives no such score."""
        if self.by is None:
            return
        given = metrics or {}
        if f"eval_{self.by}" not in given:
            scores = [n for n in given if n.startswith("eval_") and not n.endswith(("_second", "_runtime"))]
            names = [name.removeprefix("eval_") for name in scores]
            near = did_you_mean(self.by, names)
            raise TrainingError(f"keep_best asks for '{self.by}', and the evaluation gives {listing(names)}{near}")
        value = float(given[f"eval_{self.by}"])
        if self._is_better(value):
            self.step, self.value, self.waited = state.global_step, value, 0
            control.should_save = True
            return
        self.waited += 1
        if self.is_exhausted:
            control.should_training_stop = control.should_save = True

    def _is_better(self, value: float) -> bool:
        if self.value is None:
            return value == value  # A number that is none is not the best.
        return value < self.value if self.by in LOWER_IS_BETTER else value > self.value


_SAMPLED_EXAMPLES = 10_000
_SAMPLED_NUMBERS = 64


def learned(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes, by their names in the model: parameters, and what deltas and norms keep.

    The frozen start of a delta is among them, so that a run goes on from the very numbers with which it began.
    """
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for path, module in model.named_modules():
        if isinstance(module, Delta | _NormBase):
            found |= dict(module.named_buffers(prefix=path))
    return found


def weights_of(model: Any) -> dict[str, Any]:
    """What has been learned, with what the methods go by: AdaLoRA's ranks and their importance."""
    return {
        "tensors": {name: tensor.detach() for name, tensor in learned(model).items()},
        "progress": {path: delta.progress() for path, delta in _deltas(model)},
        "configs": {name: config.to_dict() for name, config in _configs(model).items()},
    }


@torch.no_grad()
def restore_weights(model: Any, stored: Mapping[str, Any]) -> None:
    """Put back what `weights_of` gave. Raises: BaseMismatchError, where the model has other tensors."""
    own, tensors = learned(model), stored["tensors"]
    differing = {n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape} | own.keys() ^ tensors
    if differing:
        raise BaseMismatchError(
            f"the checkpoint is of another model: {listing(differing, 3)} differ; resume with the recipe that began it"
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
    for path, delta in _deltas(model):
        delta.restore_progress(stored["progress"].get(path, {}))
    for name, config in _configs(model).items():
        now = config.to_dict()
        for field, value in stored["configs"].get(name, {}).items():
            # What training itself wrote there: the ranks that AdaLoRA left.
            if now.get(field) != value and hasattr(config, field):
                setattr(config, field, value)


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of all generators that training draws from."""
    kind, keys, *rest = np.random.get_state()
    found: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "cpu": torch.get_rng_state(),
    }
    if device.type != "cpu":
        found[device.type] = torch.get_device_module(device).get_rng_state(device)
    return found


def restore_random_state(stored: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    kind, keys, *rest = stored["numpy"]
    random.setstate(stored["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(stored["cpu"])
    if device.type in stored and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(stored[device.type], device)


def fingerprint_of_base(model: nn.Module) -> str:
    """A checksum over names, shapes and some numbers of all that stays frozen."""
    changing = set(learned(model))
    digest = hashlib.sha256()
    frozen = [pair for pair in [*model.named_parameters(), *model.named_buffers()] if pair[0] not in changing]
    for name, tensor in (part for pair in frozen for part in _plain(*pair)):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // _SAMPLED_NUMBERS)].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those that it is made of, as torchao's are of codes and scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{inner}", getattr(tensor, inner))


def fingerprint_of_examples(examples: Any) -> str | None:
    """A checksum over the examples, or as many of them as take no time; None for a stream, which can't be counted."""
    if not isinstance(examples, Sequence) and not hasattr(examples, "__len__"):
        return None
    digest = hashlib.sha256(str(len(examples)).encode())
    for index in range(0, len(examples), max(1, len(examples) // _SAMPLED_EXAMPLES)):
        digest.update(repr(examples[index]).encode())
    return digest.hexdigest()


def _deltas(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in adopted_modules(model):
        for name, delta in deltas_of(module).items():
            yield f"{path}:{name}", delta


def _configs(model: Any) -> dict[str, Any]:
    return getattr(model, "peft_config", {})
