"""The folder of a run until its output is whole: `OUTPUT.run` beside the output, which outlives a kill.

OUTPUT.run/run.json      the recipe that the run was begun with
OUTPUT.run/checkpoint-N  its checkpoints, with loss.jsonl and samples.jsonl as far as they go
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.errors import OutputExistsError, TrainingError
from slimtune.storage.atomic import refuse_existing, staged_file
from slimtune.train.checkpointing import LOGS, MAY_CHANGE, check_same_run, last_whole

SUFFIX = ".run"
_FACTS, _LOCK = "run.json", "lock"
_MAY_CHANGE = {"output", *(f"training.{name}" for name in MAY_CHANGE)}
_TRACKED = ("runs",)
"""Where transformers lets TensorBoard write."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    Attributes:
        overwrite: whether files of the output may be replaced, as it was allowed when the run was begun.
    """

    path: Path
    overwrite: bool

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


def check_start(output: Path, recipe: Mapping[str, Any], overwrite: bool, resume: bool) -> None:
    """Check before anything is loaded that a run may begin, or that there is one to resume.

    Raises:
        OutputExistsError: the output is there, or a run was broken off and neither is asked for.
        TrainingError: nothing to resume.
        ConfigError: the run that was broken off had another recipe.
    """
    path = folder_of(output)
    if resume:
        _check_resume(output, path)
        _check_recipe(path, recipe)
        return
    refuse_existing(output, overwrite)
    checkpoint = None if overwrite or not path.is_dir() else last_whole(path)
    if checkpoint:
        raise OutputExistsError(
            f"the run that writes {output} was broken off after step {checkpoint.step}; pass --resume to go on with "
            "it, or --overwrite to begin anew"
        )


@contextmanager
def run_folder(output: Path, recipe: Mapping[str, Any], overwrite: bool, resume: bool) -> Iterator[RunFolder]:
    """The run's folder, locked; it is removed when the block ends well, or nothing in it could be gone on from.

    Raises: as `check_start`; TrainingError, where another process trains there.
    """
    check_start(output, recipe, overwrite, resume)
    path = folder_of(output.absolute())
    if not resume:
        _remove(path)
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        if not (path / _FACTS).is_file():
            with staged_file(path / _FACTS) as pending:
                pending.write_text(json.dumps({"overwrite": overwrite, "recipe": recipe}), encoding="utf-8")
        allowed = overwrite or _facts(path)["overwrite"]
        try:
            yield RunFolder(path, allowed)
        except BaseException:
            if last_whole(path) is None:
                _remove(path)
            raise
        _remove(path)


def _check_resume(output: Path, path: Path) -> None:
    written = output.is_dir() and any(output.iterdir())
    if not path.is_dir():
        raise TrainingError(
            f"the run that wrote {output} has finished: there is nothing to resume"
            if written
            else f"there is no run to resume: {path} isn't there; leave --resume out to begin one"
        )
    if written and not _facts(path)["overwrite"]:
        # It wrote its output, and was killed before it could remove this.
        _remove(path)
        raise TrainingError(f"the run that wrote {output} has finished: there is nothing to resume")


def _check_recipe(path: Path, recipe: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(recipe))
    check_same_run(path, _by_key(_facts(path).get("recipe", now)), _by_key(now), _MAY_CHANGE)


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


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with (path / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingError(f"another process trains in {path}; wait for it, or choose another output") from error
        yield
