"""The history of runs, read from their folders alone: those of the studio, and those begun in a terminal.

FOLDER/NAME        what a run wrote: results.json of a training, comparison.json, slim_report.json, an adapter
FOLDER/NAME.run    a training that runs or was stopped (`train.run_folder`)
FOLDER/.studio     jobs of the studio (`jobs`)
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from slimtune.errors import SlimtuneError
from slimtune.storage.text_files import read_json
from slimtune.studio.figures import Numbers
from slimtune.studio.jobs import Job, Jobs, Process, last_sentence

RUN_SUFFIX = ".run"
RESULTS, RUN_FACTS = "results.json", "run.json"
Kind = Literal["training", "comparison", "check", "slim", "model", "job"]
RunState = Literal["queued", "running", "stopped", "done", "failed"]
_KINDS: dict[str, Kind] = {
    "slim_report.json": "slim", RESULTS: "training", "comparison.json": "comparison", "check.json": "check",
    "adapter_config.json": "model", "config.json": "model", "model.gguf": "model", "adapter.gguf": "model",
}  # fmt: skip
"""Files by which a folder is known, the first that it has: the last step of a slim recipe may have been a training."""
_BEGUN_WITH = ("comparison.json", "check.json")
"""Files that are there before the work is done: how it ended is known by its commands alone."""
_MAX_NAME = 200


class NoSuchRunError(SlimtuneError, LookupError):
    """A name of no run of the folder."""


class BusyRunError(SlimtuneError, RuntimeError):
    """A run that can't be changed while it waits or runs."""


@dataclass(frozen=True)
class Run:
    """A run as its folders say it.

    Attributes:
        path: of what it writes, which may not be there yet.
        changed: when something was last written, in seconds of the system's clock.
        process: that trains, whoever started it.
        results: results.json of a training that has ended, empty for others.
        facts: run.json of a training under way, with the recipe.
        fault: what is wrong with it, in a sentence.
    """

    path: Path
    kind: Kind
    state: RunState
    changed: float
    job: Job | None = None
    process: Process | None = None
    results: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    fault: str | None = None

    @property
    def name(self) -> str:
        """What it is called by."""
        return self.path.name

    @property
    def run_folder(self) -> Path:
        """Of the training under way."""
        return self.path.with_name(self.name + RUN_SUFFIX)

    @property
    def live_folder(self) -> Path:
        """Where its logs are: that of the training under way, or else what it wrote."""
        return self.run_folder if self.run_folder.is_dir() else self.path

    @property
    def is_busy(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ("queued", "running")

    @property
    def figures(self) -> Numbers:
        """The numbers of results.json."""
        return Numbers.of(self.results)

    @property
    def base(self) -> str:
        """The model that was tuned; empty where it isn't known."""
        return str(self.results.get("base") or _at(self.facts, "recipe", "model", "name") or "")

    @property
    def method(self) -> str:
        """The method of tuning; empty where it isn't known."""
        return str(self.results.get("method") or _at(self.facts, "recipe", "method", "name") or "")

    @property
    def search_text(self) -> str:
        """What a search looks at."""
        return " ".join((self.name, self.kind, self.state, self.base, self.method)).lower()


def run_path(folder: Path, name: str) -> Path:
    """The folder of a run by its name, whether it is there or not. Raises: NoSuchRunError, for what leads elsewhere."""
    # A name is one part of a path: no separator of any system, no "..", nothing hidden.
    is_part = 0 < len(name.encode()) <= _MAX_NAME and name.isprintable() and not {"/", "\\"} & set(name)
    if not is_part or name.startswith(".") or name.endswith(RUN_SUFFIX) or (folder / name).is_symlink():
        raise NoSuchRunError(f"{name!r} is no name of a run; give one without slashes, and without a dot in front")
    return folder / name


def read_runs(folder: Path, jobs: Jobs) -> list[Run]:
    """All runs of a folder, the ones changed last first; a damaged one says what is wrong with it."""
    latest = jobs.latest()
    names = {*latest, *_names(folder)}
    runs = filter(None, (_read(folder / name, latest.get(name)) for name in names))
    return sorted(runs, key=lambda run: (run.is_busy, run.changed), reverse=True)


def read_run(folder: Path, jobs: Jobs, name: str) -> Run:
    """The run of that name. Raises: NoSuchRunError."""
    run = _read(run_path(folder, name), jobs.latest().get(name))
    if run is None:
        raise NoSuchRunError(f"there is no run {name} in {folder}; it may have been deleted")
    return run


def delete_run(folder: Path, jobs: Jobs, name: str) -> None:
    """Delete a run's folders and forget its jobs. Raises: NoSuchRunError; BusyRunError, while it waits or runs."""
    run = read_run(folder, jobs, name)
    if run.is_busy:
        raise BusyRunError(f"{name} is {run.state}: stop it before it is deleted")
    for path in (run.path, run.run_folder):
        # Links within are removed as links; what they lead to stays.
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    jobs.remove(name)


def _names(folder: Path) -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield path.name.removesuffix(RUN_SUFFIX)


def _read(path: Path, job: Job | None) -> Run | None:
    """The run of a path; None where nothing there is one."""
    under_way = path.with_name(path.name + RUN_SUFFIX)
    try:
        mark = next((name for name in _KINDS if (path / name).is_file()), None)
        process = _holder(under_way)
        facts, fault = read_json_mapping(under_way / RUN_FACTS)
        results, damage = read_json_mapping(path / RESULTS) if mark == RESULTS else ({}, None)
        can_resume = any(under_way.glob("checkpoint-*"))
        changed = max(_changed(each) for each in (path, under_way, under_way / "loss.jsonl"))
    except OSError as error:
        return Run(path, "training", "failed", 0.0, fault=f"{error.filename or path}: {error.strerror or error}")
    if mark is None and job is None and not under_way.is_dir():
        return None
    kind: Kind = _KINDS[mark] if mark else "training" if under_way.is_dir() else "job"
    state: RunState
    if process is not None or (job is not None and job.state == "running"):
        state = "running"
    elif job is not None and job.state == "queued":
        state = "queued"
    elif can_resume:
        state = "stopped"
    elif job is not None and (mark is None or mark in _BEGUN_WITH):
        state = "failed" if job.state == "lost" else job.state
    else:
        state = "done" if mark is not None else "failed"
    if state == "failed" and fault is None:
        fault = (last_sentence(job.log_tail(4000)) or None) if job is not None else None
    if process is None and job is not None and state == "running":
        process = job.process
    changed = changed or (job.added if job else 0.0)
    return Run(path, kind, state, changed, job, process, results, facts, damage or fault)


def _holder(under_way: Path) -> Process | None:
    """The process that trains in a run's folder, by the id in its lock; the lock itself is not touched."""
    lock = under_way / "lock"
    try:
        pid, written = int(lock.read_text(encoding="utf-8")), lock.stat().st_mtime
    except (OSError, ValueError):
        return None
    process = Process.of(pid)
    # A process that began after the lock was written has got the id of one that is gone.
    return process if process is not None and process.is_alive and process.began <= written + 1 else None


def read_json_mapping(path: Path) -> tuple[Mapping[str, Any], str | None]:
    """The mapping in a file, or what is wrong with it; empty where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return {}, None
    try:
        value = _read_cached(path, status.st_mtime_ns, status.st_size)
    except (OSError, ValueError) as error:
        return {}, f"{path.parent.name}/{path.name} can't be read: {str(error) or type(error).__name__}"
    if not isinstance(value, dict):
        return {}, f"{path.parent.name}/{path.name} can't be read: it holds a {type(value).__name__}, not fields"
    return value, None


@lru_cache(maxsize=4096)
def _read_cached(path: Path, changed: int, size: int) -> Any:
    """A JSON file, read once for each time that it was written."""
    return read_json(path)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _at(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values
