"""The queue: commands as processes of their own, whose state is on disk alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slimtune.errors import TrainingError
from slimtune.studio.jobs import Job, Jobs, Process
from small_server import wait_until
from studio_client import held_queue

QUICK = ["--version"]
"""A command that ends at once."""


def ended(job: Job) -> bool:
    return state(job) not in ("queued", "running")


def state(job: Job) -> str:
    """As it is now: a job remembers what it has read."""
    read = Job.read(job.folder)
    assert read is not None
    return read.state


def test_jobs_run_one_after_the_other_and_say_how_they_ended(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    good, bad = jobs.add("good", QUICK), jobs.add("bad", ["recipe", "show", "nonsense"])
    assert [job.name for job in jobs] == ["good", "bad"]
    wait_until(lambda: ended(bad), 120)
    good, bad = jobs
    assert (good.state, good.exit_code, good.log_tail()) == ("done", 0, "0.1.0\n")
    assert (bad.state, bad.exit_code) == ("failed", 2)
    assert "no recipe 'nonsense'" in bad.log_tail()
    assert (bad.folder / "process.json").stat().st_mtime_ns >= (good.folder / "exit_code").stat().st_mtime_ns
    assert jobs.latest() == {"good": good, "bad": bad}


def test_a_job_runs_where_it_was_added_and_no_file_there_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "typer.py").write_text("raise SystemExit('a file of the folder was run')")
    monkeypatch.chdir(tmp_path)
    jobs = Jobs(tmp_path / "runs")
    job = jobs.add("here", ["recipe", "init", "mine.yaml"])
    wait_until(lambda: ended(job), 120)
    assert (tmp_path / "mine.yaml").is_file(), Job.read(job.folder)
    assert job.command == "slimtune recipe init mine.yaml"


def test_a_waiting_job_is_withdrawn_and_an_ended_one_cannot_be_stopped(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    with held_queue(tmp_path):
        job = jobs.add("later", QUICK)
        assert job.state == "queued"
        jobs.stop(job)
        assert state(job) == "stopped"
        with pytest.raises(TrainingError, match="nothing to stop"):
            jobs.stop(job)


def test_a_queue_that_was_left_goes_on_with_the_next_server(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    with held_queue(tmp_path):
        job = jobs.add("left", QUICK)
    assert state(job) == "queued"
    Jobs(tmp_path).run_on()
    wait_until(lambda: state(job) == "done", 120)


def test_a_job_outlives_a_killed_server_and_ctrl_c_reaches_it(tmp_path: Path) -> None:
    """A shell lets what it starts with & ignore Ctrl-C, and so would what that starts, if nobody saw to it."""
    code = (
        "import signal, sys; from pathlib import Path; from slimtune.studio.jobs import Jobs; "
        "signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "Jobs(Path(sys.argv[1])).add('page', ['studio', '--port', '0', '--folder', sys.argv[1] + '/inner']); "
        "signal.pause()"
    )
    server = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    wait_until(lambda: any("Ctrl-C ends it" in job.log_tail() for job in Jobs(tmp_path)), 120)
    server.kill()
    server.wait()
    (running,) = Jobs(tmp_path)
    assert running.state == "running"
    assert running.process is not None
    assert os.getpgid(running.process.pid) != os.getpgid(0)
    waiting = Jobs(tmp_path).add("next", QUICK)
    assert waiting.state == "queued"
    Jobs(tmp_path).stop(running)
    wait_until(lambda: state(running) == "stopped" and state(waiting) == "done", 120)


def test_the_process_of_a_job_is_known_by_more_than_its_id(tmp_path: Path) -> None:
    mine = Process.of(os.getpid())
    assert mine is not None
    assert mine.is_alive
    assert not Process(mine.pid, mine.began - 100).is_alive
    assert not Process(2**22 + 1, mine.began).is_alive
    assert Process.of(-1) is None


DAMAGED: dict[str, Any] = {
    "job.json": [
        b"",
        b"{",
        b"[]",
        b'{"name": "x"}',
        b'{"name": "x", "arguments": 3, "directory": "/", "added": "now"}',
    ],
    "process.json": [
        b"",
        b"[]",
        b'{"process": 3}',
        b'{"process": {"pid": "a", "began": 1}}',
        b'{"process": null, "runner": null}',
        b'{"process": {"pid": 99999999999999999999, "began": 1}, "runner": {"pid": -1, "began": 1}}',
    ],
    "exit_code": [b"", b"zero", b"\xff"],
}


@pytest.mark.parametrize(("file", "content"), [(file, each) for file, some in DAMAGED.items() for each in some])
def test_a_damaged_job_fails_nobody(tmp_path: Path, file: str, content: bytes) -> None:
    jobs = Jobs(tmp_path)
    folder = jobs.folder / "00001"
    folder.mkdir(parents=True)
    values = {"name": "x", "arguments": QUICK, "directory": "/", "added": 1.0}
    (folder / "job.json").write_text(json.dumps(values))
    (folder / file).write_bytes(content)
    os.utime(folder, (1, 1))
    assert [job.state for job in jobs] in ([], ["lost"])
    assert jobs.find("00001") is None or jobs.find("00001") == next(iter(jobs))
    assert jobs.find("../00001") is None


def test_a_stopped_job_is_told_from_one_that_failed(tmp_path: Path) -> None:
    codes = {0: "done", 1: "failed", 2: "failed", 130: "stopped", 143: "stopped", -signal.SIGKILL: "failed"}
    jobs = Jobs(tmp_path)
    with held_queue(tmp_path):
        for code, expected in codes.items():
            job = jobs.add("x", QUICK)
            (job.folder / "exit_code").write_text(str(code))
            assert state(job) == expected
