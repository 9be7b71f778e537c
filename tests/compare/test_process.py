"""Commands in processes of their own: their JSON, their words when they fail, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from slimtune.compare import process


class Told:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.seen: list[tuple[int, int]] = []

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def advance(self, done: int, total: int) -> None:
        self.seen.append((done, total))


def test_what_is_printed_is_kept_and_what_is_said_is_logged(tmp_path: Path) -> None:
    told = Told()
    commands = [["methods", "--json"], ["recipe", "list", "--json"]]
    assert process.run(commands, tmp_path, tmp_path / "log.txt", told) is None
    assert "lora" in str(json.loads((tmp_path / "methods.json").read_text()))
    assert "compare" in json.loads((tmp_path / "recipe.json").read_text())
    assert told.stages == ["methods", "recipe"]
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert [line for line in log if line.startswith("$")] == [
        "$ slimtune methods --json",
        "$ slimtune recipe list --json",
    ]


def test_a_failure_is_told_in_the_words_of_the_command_and_is_the_end(tmp_path: Path) -> None:
    commands = [["recipe", "list", "--json"], ["methods", "lorra", "--json"], ["doctor", "--json"]]
    failure = process.run(commands, tmp_path, tmp_path / "log.txt", Told())
    assert failure is not None
    assert failure.command == "methods"
    assert "no method 'lorra'; did you mean 'lora'" in failure.reason
    assert {path.name for path in tmp_path.glob("*.json")} == {"recipe.json"}


def test_a_command_without_json_is_a_failure(tmp_path: Path) -> None:
    failure = process.run([["recipe", "show", "chat"]], tmp_path, tmp_path / "log.txt", Told())
    assert failure is not None
    assert "recipe printed no JSON" in failure.reason


@pytest.mark.parametrize(
    ("said", "code", "reason"),
    [
        (["a", "slimtune: no room; make some", "b"], 1, "no room; make some"),
        (["Traceback (most recent call last):", "ValueError: x", ""], 1, "ValueError: x"),
        ([], 3, "exit code 3"),
        (["anything"], -9, "killed by SIGKILL; the system may have run out of memory"),
    ],
)
def test_the_reason_of_a_failure(said: list[str], code: int, reason: str) -> None:
    assert process.reason(code, said) == reason


COUNTS = """
    import time
    from rich.console import Console
    from slimtune import progress
    progress.LINE_SECONDS = 0
    with progress.Counting(Console(stderr=True)) as counting:
        counting.start("training, step", 2000)
        counting.reach(1, told="loss 0.5")
        counting.reach(2000)
        Console(stderr=True).print("  kept in runs/2024/11 for now")
    """
ENDLESS = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"


def test_lines_of_progress_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `Counting` prints them, in the place of the worker."""
    monkeypatch.setattr(process, "WORKER", (sys.executable, "-c", textwrap.dedent(COUNTS)))
    told = Told()
    assert process.run([["train"]], tmp_path, tmp_path / "log.txt", told) is None
    assert told.seen == [(1, 2000), (2000, 2000)]


@pytest.mark.skipif(sys.platform != "linux", reason="what follows a killed parent is told by Linux alone")
def test_a_run_ends_with_the_comparison_that_started_it(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from slimtune.compare import process
process.WORKER = (sys.executable, "-c", {ENDLESS!r})
process.run([["train"]], Path(), Path("log.txt"), None)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        pid = _wait_for(tmp_path / "pid")
        parent.kill()
        parent.wait()
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
