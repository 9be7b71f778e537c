"""The folder of a run until its output is whole: `OUTPUT.run` beside the output, which outlives a kill.

OUTPUT.run/lock          held by the process that trains, with its id
OUTPUT.run/run.json      the recipe that the run was begun with, and the memory that it was planned to take
OUTPUT.run/progress.json step, speed, time left and memory, once a second
OUTPUT.run/checkpoint-N  its checkpoints, with loss.jsonl and samples.jsonl as far as they go
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from slimtune.console.process import this_process
from slimtune.errors import OutputExistsError, TrainingError
from slimtune.storage.atomic import check_name, refuse_existing, remove_left_behind, staged_file
from slimtune.train.checkpointing import LOGS, MAY_CHANGE, check_same_run, last_whole
from slimtune.train.processes import wait

try:
    import fcntl
except ImportError:
    # On Windows nothing is locked: that two processes don't train in one folder is for the user to see there.
    fcntl = None

SUFFIX = ".run"
_FACTS, _LOCK = "run.json", "lock"
_MAY_CHANGE = {"output", *(f"training.{name}" for name in MAY_CHANGE)}
_TRACKED = ("runs",)
"""Where transformers lets TensorBoard write."""


@dataclass
class RunFolder:
    """The folder of one run, locked by this process, or by the first of several.

    Attributes:
        recipe: of the run; where it goes on and its `model.dtype` is auto, with the dtype in which it was begun.
        overwrite: whether files of the output may be replaced, as it was allowed when the run was begun.
        resume: whether the run of an earlier process goes on.
        planned: the memory that it is planned to take, where that is known.
        is_locked: whether this process holds the lock, and writes.
        is_begun: whether this process has written into it.
        is_done: whether the weights are in the output, so that nothing here is needed any more.
    """

    path: Path
    recipe: Mapping[str, Any]
    overwrite: bool
    resume: bool
    planned: Mapping[str, Any] | None = None
    is_locked: bool = True
    is_begun: bool = False
    is_done: bool = False

    def begin(self) -> None:
        """Remove what an earlier run left, unless it is resumed, and write the recipe."""
        self.is_begun = True
        if self.is_locked:
            # Not before the model is loaded: a mistake found until then must not cost an older run its checkpoints.
            if not self.resume:
                _empty(self.path)
            if not (self.path / _FACTS).is_file():
                facts = {"overwrite": self.overwrite, "recipe": self.recipe, "planned": self.planned}
                with staged_file(self.path / _FACTS) as pending:
                    pending.write_text(json.dumps(facts), encoding="utf-8")
            self.overwrite = self.overwrite or _facts(self.path)["overwrite"]
        wait()

    def hand_over(self, output: Path) -> None:
        """Copy to the output what the run wrote step by step: its logs, and those of trackers that write files."""
        for name in LOGS:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, output / name)
        for name in _TRACKED:
            if (self.path / name).is_dir():
                shutil.copytree(self.path / name, output / name)


def folder_of(output: Path) -> Path:
    """The folder of the run that writes `output`."""
    return output.with_name(output.name + SUFFIX)


@contextmanager
def run_folder(output: Path, recipe: Mapping[str, Any], overwrite: bool, resume: bool) -> Iterator[RunFolder]:
    """Lock the run's folder, before anything is read or loaded; nothing in it changes before `begin`.

    It is removed at the end of the block, unless a checkpoint in it can be resumed from.

    Raises:
        OutputExistsError: the output exists, or a run was interrupted, and neither option for it is set.
        TrainingError: another process trains there, it can't be written, or there is nothing to resume.
        ConfigError: the run to resume had another recipe, or the output's name is too long.
    """
    output = output.absolute()
    path = folder_of(output)
    check_name(output)
    if not this_process().is_main:
        wait()
        recipe = _as_begun(recipe, _facts(path)) if resume else recipe
        yield RunFolder(path, recipe, overwrite, resume, is_locked=False)
        return
    if resume:
        _check_resume(output, path)
    with _locked(path):
        remove_left_behind(output)
        folder = RunFolder(path, recipe, overwrite, resume)
        try:
            _check_start(folder, output)
            wait()
            yield folder
        finally:
            is_empty = not any(entry.name != _LOCK for entry in path.iterdir())
            if is_empty or folder.is_done or (folder.is_begun and last_whole(path) is None):
                _remove(path)


def _check_start(folder: RunFolder, output: Path) -> None:
    """See that the run may begin, or that there is one to resume. Raises: as `run_folder`."""
    if folder.resume:
        if _is_written(output) and not _facts(folder.path)["overwrite"]:
            # An earlier process wrote the output, and was killed before it could remove this.
            folder.is_done = True
            raise TrainingError(f"the run that wrote {output} has finished: there is nothing to resume")
        facts = _facts(folder.path)
        folder.recipe = now = _as_begun(json.loads(json.dumps(folder.recipe)), facts)
        then = facts.get("recipe", now)
        check_same_run(folder.path, _by_key(then), _by_key(now), _MAY_CHANGE)
        return
    refuse_existing(output, folder.overwrite)
    if output.is_dir() and not os.access(output, os.W_OK | os.X_OK):
        raise TrainingError(f"the output folder {output} can't be written to; choose another output")
    checkpoint = None if folder.overwrite else last_whole(folder.path)
    if checkpoint:
        raise OutputExistsError(
            f"the run that writes {output} was broken off after step {checkpoint.step}; pass --resume to go on with "
            "it, or --overwrite to begin anew"
        )


def _as_begun(recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe of a run that goes on, with the dtype in which it was begun in place of auto."""
    # What auto is depends on the processor and on the version: only the run knows what it was.
    begun = facts.get("recipe", {}).get("model", {}).get("dtype")
    model = recipe.get("model", {})
    return {**recipe, "model": {**model, "dtype": begun}} if begun and model.get("dtype") == "auto" else recipe


def _check_resume(output: Path, path: Path) -> None:
    if not path.is_dir():
        raise TrainingError(
            f"the run that wrote {output} has finished: there is nothing to resume"
            if _is_written(output)
            else f"there is no run to resume: {path} isn't there; leave --resume out to begin one"
        )


def _is_written(output: Path) -> bool:
    return output.is_dir() and any(output.iterdir())


def _facts(path: Path) -> dict[str, Any]:
    # A run that was killed before it wrote them was not begun.
    facts = path / _FACTS
    return json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {"overwrite": False}


def _by_key(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"training": {"seed": 0}}` as `{"training.seed": 0}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        is_section = isinstance(value, dict) and value
        flat |= _by_key(value, f"{prefix}{name}.") if is_section else {prefix + name: value}
    return flat


def _empty(path: Path) -> None:
    """Remove all of a folder but its lock."""
    for entry in [entry for entry in path.iterdir() if entry.name != _LOCK]:
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    """Remove a folder, its lock last: until then no other process may begin there."""
    _empty(path)
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when the process ends, however it ends."""
    with _lock_of(path) as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = f"process {file.read().strip()}"
            raise TrainingError(f"{holder} trains in {path}; wait for it, or choose another output") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        if fcntl is not None and not _is_in_place(file, path):
            # The process that held the lock removed the folder after this one had opened the file.
            raise TrainingError(f"the run in {path} has ended this moment; start again")
        yield


def _lock_of(path: Path) -> IO[str]:
    try:
        path.mkdir(parents=True, exist_ok=True)
        return (path / _LOCK).open("a+")
    except OSError as error:
        raise TrainingError(
            f"the folder of the run, {path}, can't be written: {error.strerror}; choose another output"
        ) from error


def _is_in_place(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), (path / _LOCK).stat())
    except FileNotFoundError:
        return False
