"""Commands in processes of their own: their JSON, their words when they fail, and how they end."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from slimtune.compare import process
from slimtune.errors import TrainingError


def test_what_is_printed_is_read_and_what_is_said_is_logged(tmp_path: Path) -> None:
    found = process.run(["methods", "--json"], tmp_path / "log.txt")
    assert "lora" in str(found)
    assert (tmp_path / "log.txt").read_text().startswith("$ slimtune methods --json")


def test_a_failure_is_told_in_the_words_of_the_command(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no method 'lorra'; did you mean 'lora'"):
        process.run(["methods", "lorra", "--json"], tmp_path / "log.txt")


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
    assert process._reason(code, said) == reason


def test_lines_of_progress_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "slimtune.py"
    program.write_text(
        textwrap.dedent("""
            import sys
            print("loading", file=sys.stderr)
            print("  step 1,000/2,000  loss 0.5", file=sys.stderr)
            print("{\\"a\\": 1}")
        """)
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen: list[tuple[int, int]] = []
    assert process.run(["train"], tmp_path / "log.txt", lambda *so_far: seen.append(so_far)) == {"a": 1}
    assert seen == [(1000, 2000)]


@pytest.mark.skipif(sys.platform != "linux", reason="what follows a killed parent is told by Linux alone")
def test_a_run_ends_with_the_comparison_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "slimtune.py").write_text(
        "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    )
    code = f"""
import os
from pathlib import Path
from slimtune.compare import process
os.environ["PYTHONPATH"] = {str(tmp_path)!r}
process.run(["train"], Path("log.txt"))
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
