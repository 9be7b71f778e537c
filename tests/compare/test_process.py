"""Stages in processes of their own: their results, their words when they fail, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from slimtune.compare import process
from slimtune.compare.results import Stage
from slimtune.console import progress
from slimtune.errors import ConfigError


class Told:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.seen: list[tuple[int, int]] = []

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def advance(self, done: int, total: int) -> None:
        self.seen.append((done, total))


def fine(value: int) -> dict[str, Any]:
    print("printed")
    print("said", file=sys.stderr)
    return {"value": value, "columns": os.environ["COLUMNS"], "session": os.getsid(0), "pid": os.getpid()}


def mistaken() -> dict[str, Any]:
    raise ConfigError("no room; make some")


def broken() -> dict[str, Any]:
    raise ValueError("x")


def killed() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def exits() -> dict[str, Any]:
    sys.exit(3)


def not_json() -> dict[str, Any]:
    return {"value": Told()}


def counts() -> dict[str, Any]:
    """As a training does, a thousand steps a second."""
    with progress.Counting(Console(stderr=True)) as counting:
        counting.start("training, step", 2000)
        counting.reach(1, beside="loss 0.5")
        for _ in range(1000):
            counting.advance()
        counting.reach(2000)
    return {}


def endless(pid: Path) -> dict[str, Any]:
    pid.write_text(str(os.getpid()))
    time.sleep(60)
    return {}


def run(folder: Path, told: Told, *stages: Stage) -> process.Failure | None:
    return process.run(stages, folder, folder / "log.txt", told)


def test_results_are_kept_and_what_is_said_is_logged(tmp_path: Path) -> None:
    told = Told()
    stages = Stage("first", partial(fine, value=1)), Stage("second", partial(fine, value=2))
    assert run(tmp_path, told, *stages) is None
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second"))
    assert (first["value"], second["value"], first["columns"]) == (1, 2, "200")
    assert first["pid"] == second["pid"] == first["session"] != os.getpid()
    assert told.stages == ["first", "second"]
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert [line for line in log if line.startswith("==")] == ["== first value=1", "== second value=2"]
    assert {"said", "printed"} <= set(log)


def test_a_failure_is_told_in_a_sentence_and_is_the_end(tmp_path: Path) -> None:
    stages = Stage("first", partial(fine, value=1)), Stage("second", mistaken), Stage("third", partial(fine, value=3))
    failure = run(tmp_path, Told(), *stages)
    assert failure == process.Failure("second", "no room; make some")
    assert {path.name for path in tmp_path.glob("*.json")} == {"first.json"}
    log = (tmp_path / "log.txt").read_text()
    assert "slimtune: no room; make some" in log
    assert "Traceback" not in log


def test_a_result_that_is_no_json_is_a_failure(tmp_path: Path) -> None:
    failure = run(tmp_path, Told(), Stage("first", not_json))
    assert failure is not None
    assert "Told is not JSON serializable" in failure.reason
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (broken, "ValueError: x"),
        (exits, "exit code 3"),
        (killed, "killed by SIGKILL; the system may have run out of memory"),
    ],
)
def test_the_reason_of_a_failure(tmp_path: Path, work: Any, reason: str) -> None:
    assert run(tmp_path, Told(), Stage("train", work)) == process.Failure("train", reason)
    assert ("Traceback" in (tmp_path / "log.txt").read_text()) == (work is broken)


def test_progress_is_passed_on(tmp_path: Path) -> None:
    told = Told()
    assert run(tmp_path, told, Stage("train", counts)) is None
    assert (told.seen[0], told.seen[-1]) == ((1, 2000), (2000, 2000))
    assert len(told.seen) < 100


PARENT = """
import signal
import sys
from functools import partial
from pathlib import Path
from compare.test_process import Told, endless, run
from slimtune.compare.results import Stage
if __name__ == "__main__":
    # Whoever runs the tests in the background has it ignored, which a process inherits.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(Path(), Told(), Stage("train", partial(endless, pid=Path("pid"))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what follows a killed parent is told by Linux alone")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_ends_with_the_comparison_that_started_it(tmp_path: Path, number: int) -> None:
    path = os.pathsep.join(map(str, sys.path))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.DEVNULL
    )
    try:
        pid = _wait_for(tmp_path / "pid")
        parent.send_signal(number)
        assert parent.wait(20) == -number
        ended = any(not _is_alive(pid) or time.sleep(0.05) for _ in range(100))
        assert ended
    finally:
        parent.kill()


def _wait_for(path: Path) -> int:
    for _ in range(400):
        if path.is_file() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"{path} was not written")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process whose parent is gone may stay as a zombie where nobody collects them.
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
