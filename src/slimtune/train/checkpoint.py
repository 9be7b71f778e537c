"""The checkpoints of a run on disk: each whole or not there, the last whole one found, old ones removed.

A checkpoint is written as `checkpoint-N.partial`, synced, read back, given a manifest with the SHA-256 of each file,
and renamed: a kill at any moment leaves the one before. Which one is best is a matter of the run, so it is told.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.errors import TrainingError
from slimtune.staging import sync

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
