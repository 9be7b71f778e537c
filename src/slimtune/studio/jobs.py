"""Long work: commands of `slimtune` that run one after the other, each as a process of its own, with all state on disk.

    FOLDER/.studio/jobs/NUMBER/job.json      what is run: the name of its run, the arguments behind `slimtune`, where
    FOLDER/.studio/jobs/NUMBER/queued        is there while it waits; whoever removes it has claimed the job
    FOLDER/.studio/jobs/NUMBER/process.json  its process and the runner that waits for it: id, and when it began
    FOLDER/.studio/jobs/NUMBER/log           what it prints
    FOLDER/.studio/jobs/NUMBER/exit_code     once it has ended
    FOLDER/.studio/runner.lock               held by the runner

The runner (`python -m slimtune.studio.jobs FOLDER`) is a process apart from the server: it starts the job that waits
longest, waits for its end, and goes when none is left. So the queue goes on when browser and server are gone, and a
server that starts finds all of it again.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Literal

import psutil

from slimtune.errors import TrainingError
from slimtune.storage.atomic import write_file
from slimtune.storage.text_files import read_json

try:
    import fcntl
except ImportError:
    # On Windows two servers over one folder would run two jobs at once.
    fcntl = None

OWN_FOLDER = ".studio"
PREFIX = "slimtune: "
"""Of the sentence in which a command says why it failed."""
_QUEUED, _JOB, _PROCESS, _LOG, _EXIT_CODE = "queued", "job.json", "process.json", "log", "exit_code"
_LOOK_SECONDS = 0.5
_STOPPED_BY = {128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}
"""Exit codes of a command that was stopped: its own, or those of one that the signal ended."""
_CLOCK_SECONDS = 2.0
_START_SECONDS = 10.0

JobState = Literal["queued", "running", "done", "stopped", "failed", "lost"]


@dataclass(frozen=True)
class Process:
    """A process by its id and the moment when it began, for the system gives ids again."""

    pid: int
    began: float

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process of this id that runs now; None for none."""
        try:
            return cls(pid, psutil.Process(pid).create_time())
        except (psutil.Error, ValueError, OverflowError):
            return None

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        now = Process.of(self.pid)
        if now is None or abs(now.began - self.began) > _CLOCK_SECONDS:
            return False
        try:
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def memory_bytes(self) -> int | None:
        """The main memory of it and of those that it started; None once it has ended."""
        try:
            process = psutil.Process(self.pid)
            return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))
        except psutil.Error:
            return None


@dataclass(frozen=True)
class Job:
    """A command that waits, runs or has ended.

    Attributes:
        folder: its own, whose name is its number.
        name: of the run that it is about.
        arguments: behind `slimtune`.
        directory: where it runs: relative paths in the arguments mean the same as for whoever types them there.
        added: when it came into the queue.
    """

    folder: Path
    name: str
    arguments: tuple[str, ...]
    directory: str
    added: float

    @classmethod
    def read(cls, folder: Path) -> Job | None:
        """The job in a folder; None for what is none, or is damaged."""
        path = folder / _JOB
        try:
            return cls(folder, *_read_fields(path, path.stat().st_mtime_ns))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def number(self) -> str:
        """What it is called by."""
        return self.folder.name

    @property
    def command(self) -> str:
        """What a user would type."""
        return shlex.join(["slimtune", *self.arguments])

    @cached_property
    def process(self) -> Process | None:
        """The process that ran it, or runs it."""
        return self._process("process")

    @cached_property
    def runner(self) -> Process | None:
        """The process that waits for its end, to write down how it ended."""
        return self._process("runner")

    def _process(self, name: str) -> Process | None:
        try:
            values = read_json(self.folder / _PROCESS)[name]
            return Process(int(values["pid"]), float(values["began"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @cached_property
    def exit_code(self) -> int | None:
        """Its exit code, once it has ended; negative for the signal that ended it."""
        return _read_code(self.folder)

    @cached_property
    def state(self) -> JobState:
        """How far it is; lost is a job whose process ended without a word, as when the machine is switched off."""
        if self.exit_code is not None:
            return _ended_as(self.exit_code)
        if (self.folder / _QUEUED).exists():
            return "queued"
        if self.process is None:
            # It was claimed this moment, and its process is being started.
            return "running" if time.time() - self.folder.stat().st_mtime < _START_SECONDS else "lost"
        # Its end is seen by the system before the runner has written it down.
        if self.process.is_alive or (self.runner is not None and self.runner.is_alive):
            return "running"
        # Written since it was looked at above, by a runner that has gone since.
        code = _read_code(self.folder)
        return "lost" if code is None else _ended_as(code)

    @property
    def is_busy(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ("queued", "running")

    def log_tail(self, most: int = 16_000) -> str:
        """The last bytes of what it printed, from the beginning of a line."""
        try:
            with (self.folder / _LOG).open("rb") as file:
                file.seek(0, os.SEEK_END)
                start = max(0, file.tell() - most)
                file.seek(start)
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return text.partition("\n")[2] if start else text


@lru_cache(maxsize=4096)
def _read_fields(path: Path, changed: int) -> tuple[str, tuple[str, ...], str, float]:
    """What job.json holds, read once: it is never written again, but a number may be given again."""
    values = read_json(path)
    arguments = tuple(str(word) for word in values["arguments"])
    return str(values["name"]), arguments, str(values["directory"]), float(values["added"])


def _read_code(folder: Path) -> int | None:
    try:
        return int((folder / _EXIT_CODE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _ended_as(code: int) -> JobState:
    return "done" if code == 0 else "stopped" if code in _STOPPED_BY else "failed"


class Jobs:
    """The jobs of a folder of runs."""

    def __init__(self, runs: Path) -> None:
        self.runs, self.folder = runs, runs / OWN_FOLDER / "jobs"

    def __iter__(self) -> Iterator[Job]:
        """All jobs, in the order in which they were added."""
        folders = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        yield from filter(None, map(Job.read, folders))

    def find(self, number: str) -> Job | None:
        """The job of a number; None for none."""
        return Job.read(self.folder / number) if re.fullmatch(r"\d+", number) else None

    def latest(self) -> dict[str, Job]:
        """The job of each run that says how far it is, by the run's name: the first that is busy, or else the last."""
        latest: dict[str, Job] = {}
        for job in self:
            before = latest.get(job.name)
            if before is None or not before.is_busy:
                latest[job.name] = job
        return latest

    def waiting(self) -> list[Job]:
        """Those that wait, in the order in which they will run."""
        return list(filter(None, (Job.read(path.parent) for path in sorted(self.folder.glob(f"*/{_QUEUED}")))))

    def named(self, name: str) -> list[Job]:
        """The jobs of a run, in the order in which they were added."""
        return [job for job in self if job.name == name]

    def add(self, name: str, arguments: Sequence[str]) -> Job:
        """Put a command into the queue, and see that it is run.

        Args:
            name: of the run that it is about.
            arguments: behind `slimtune`.
        """
        folder = self._new_folder()
        job = Job(folder, name, tuple(arguments), os.getcwd(), time.time())
        (folder / _QUEUED).touch()
        values = {"name": name, "arguments": list(arguments), "directory": job.directory, "added": job.added}
        # Last: a folder without it is no job.
        write_file(folder / _JOB, json.dumps(values, ensure_ascii=False))
        self.run_on()
        return job

    def run_on(self) -> None:
        """See that a runner runs, if a job waits; one more than is needed goes at once."""
        if any(job.state == "queued" for job in self):
            spawn("slimtune.studio.jobs", [str(self.runs)], self.runs)

    def stop(self, job: Job) -> None:
        """Take a waiting job out of the queue; have a running one stop, as Ctrl-C does, with its checkpoint.

        Raises: TrainingError, where it has ended.
        """
        if _claimed(job):
            (job.folder / _EXIT_CODE).write_text(str(128 + signal.SIGINT), encoding="utf-8")
            return
        job = Job.read(job.folder) or job
        if job.process is None or job.state != "running":
            raise TrainingError(f"the job of {job.name} has ended: there is nothing to stop")
        interrupt(job.process)

    def stop_all(self, jobs: Sequence[Job]) -> None:
        """Stop those that wait or run, the last first, or one that waits would begin in place of the one before it."""
        for job in reversed(jobs):
            if job.is_busy:
                self.stop(job)

    def remove(self, name: str) -> None:
        """Forget the ended jobs of a run."""
        for job in self:
            if job.name == name and not job.is_busy:
                shutil.rmtree(job.folder, ignore_errors=True)

    def _new_folder(self) -> Path:
        while True:
            numbers = [int(path.name) for path in self.folder.glob("*") if path.name.isdigit()]
            folder = self.folder / f"{max(numbers, default=0) + 1:05}"
            # Two servers, or two requests, may have counted alike.
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder


def last_sentence(printed: str) -> str:
    """The last sentence of slimtune's own in what a command printed, or else its last line."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith(PREFIX)), lines[-1] if lines else "")
    return said.removeprefix(PREFIX)


def interrupt(process: Process) -> None:
    """Send Ctrl-C to a process; one that has ended gets none, nor whatever has its id now."""
    if process.is_alive:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGINT)


def run_queue(runs: Path) -> None:
    """Run the jobs that wait one after the other, until there are none; nothing where another runner does it."""
    jobs = Jobs(runs)
    # Again after the lock is given back: a job may have come in between, whose own runner found the lock held.
    while any(job.state == "queued" for job in jobs):
        with _locked(runs / OWN_FOLDER / "runner.lock") as is_held:
            if not is_held:
                return
            while (job := next((job for job in jobs if job.state == "queued"), None)) is not None:
                _wait_for_others(jobs)
                if _claimed(job):
                    _run(job)


def _wait_for_others(jobs: Jobs) -> None:
    """Wait for jobs whose runner was killed: two at once may not fit into memory."""
    while any(job.state == "running" for job in jobs):
        time.sleep(_LOOK_SECONDS)


def _claimed(job: Job) -> bool:
    """Take a job out of the queue; False where somebody else did. Only one of several succeeds."""
    try:
        (job.folder / _QUEUED).unlink()
    except FileNotFoundError:
        return False
    return True


def _run(job: Job) -> None:
    try:
        with (job.folder / _LOG).open("ab") as log:
            child = spawn("slimtune", job.arguments, Path(job.directory), log)
    except OSError as error:
        (job.folder / _LOG).write_text(f"slimtune: {job.directory}: {error.strerror}\n", encoding="utf-8")
        (job.folder / _EXIT_CODE).write_text("1", encoding="utf-8")
        return
    processes = {"process": Process.of(child.pid), "runner": Process.of(os.getpid())}
    write_file(job.folder / _PROCESS, json.dumps({name: each and asdict(each) for name, each in processes.items()}))
    code = child.wait()
    # Not if the run was deleted meanwhile.
    if job.folder.is_dir():
        write_file(job.folder / _EXIT_CODE, str(code))


def spawn(
    module: str, arguments: Sequence[str], directory: Path, log: IO[bytes] | int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """A process in a session of its own: neither the end of the server nor Ctrl-C in its terminal ends it."""
    return subprocess.Popen(
        # Without -P, Python would run a torch.py that lies in the folder.
        [sys.executable, "-P", "-m", module, *arguments],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock, which the system releases when the process ends; False where another one holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
        yield True


def main() -> None:
    """Be the runner of the folder that is named."""
    # A server that was started in the background of a script ignores Ctrl-C, and what it starts would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_queue(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
