"""Runs as their folders say it, whatever is in them, and what may be deleted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slimtune.studio.history import BusyRunError, NoSuchRunError, delete_run, read_run, read_runs, run_path
from slimtune.studio.jobs import Jobs
from slimtune.train.run_folder import run_folder
from studio_client import held_queue, open_studio, write_run


def states(folder: Path) -> dict[str, str]:
    return {run.name: run.state for run in read_runs(folder, Jobs(folder))}


def test_a_run_that_a_terminal_began_is_seen_and_so_is_its_end(tmp_path: Path) -> None:
    recipe = {"model": {"name": "base"}, "method": {"name": "lora"}}
    with run_folder(tmp_path / "mine", recipe, False, False) as folder:
        folder.begin()
        (folder.path / "loss.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
        run = read_run(tmp_path, Jobs(tmp_path), "mine")
        assert (run.state, run.kind, run.base, run.method) == ("running", "training", "base", "lora")
        assert run.process is not None
        assert run.process.pid == os.getpid()
        assert "hx-sse:connect" in open_studio(tmp_path).get("/runs/mine").text
        with pytest.raises(BusyRunError, match="running"):
            delete_run(tmp_path, Jobs(tmp_path), "mine")
        (folder.path / "checkpoint-1").mkdir()
        # A kill leaves the lock with the id of a process that is gone.
        gone = subprocess.Popen(["true"])
        gone.wait()
        (folder.path / "lock").write_text(str(gone.pid))
        assert states(tmp_path) == {"mine": "stopped"}


def test_an_id_that_the_system_gave_again_is_not_the_run(tmp_path: Path) -> None:
    lock = tmp_path / "old.run" / "lock"
    lock.parent.mkdir()
    lock.write_text(str(os.getpid()))
    os.utime(lock, (1e9, 1e9))
    assert states(tmp_path) == {"old": "failed"}


def test_a_check_is_one_and_is_done_when_all_of_its_commands_are(tmp_path: Path) -> None:
    client, jobs = open_studio(tmp_path), Jobs(tmp_path)
    (tmp_path / "orders-check").mkdir()
    (tmp_path / "orders-check" / "check.json").write_text('{"run": "orders"}')
    with held_queue(tmp_path):
        first, last = (jobs.add("orders-check", ["--version"]) for _ in range(2))

        def seen() -> tuple[str, str]:
            run = read_run(tmp_path, jobs, "orders-check")
            return run.kind, run.state

        assert seen() == ("check", "queued")
        (first.folder / "queued").unlink()
        assert seen() == ("check", "running")
        (first.folder / "exit_code").write_text("0")
        assert seen() == ("check", "queued")
        page = client.get("/runs/orders-check").text
        assert 'href="/outcome/checks/orders-check"' in page
        assert "It is the next one." in page
        client.post("/runs/orders-check/stop")
        assert seen() == ("check", "stopped")
        (last.folder / "exit_code").write_text("0")
        assert seen() == ("check", "done")


def test_what_a_stop_takes_out_of_the_queue_is_all_of_a_check(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    with held_queue(tmp_path):
        for name in ("orders-check", "other", "orders-check"):
            jobs.add(name, ["--version"])
        assert [job.name for job in jobs.waiting()] == ["orders-check", "other", "orders-check"]
        open_studio(tmp_path).post("/runs/orders-check/stop")
        assert [job.name for job in jobs.waiting()] == ["other"]
        jobs.stop_all(jobs.waiting())


def test_a_command_that_writes_no_known_file_is_done_when_it_is(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    with held_queue(tmp_path):
        for code, state in ((0, "done"), (1, "failed"), (130, "stopped")):
            job = jobs.add("packed", ["--version"])
            (job.folder / "queued").unlink()
            (job.folder / "exit_code").write_text(str(code))
            assert states(tmp_path) == {"packed": state}
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "model.gguf").touch()
    assert read_run(tmp_path, jobs, "packed").kind == "model"


def test_each_kind_of_folder_is_known_and_others_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "trained")
    for name, file in (("compared", "comparison.json"), ("slimmed", "slim_report.json"), ("a model", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    # Its last step was a training.
    (tmp_path / "slimmed" / "results.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "linked").symlink_to(tmp_path / "trained")
    kinds = {run.name: run.kind for run in read_runs(tmp_path, Jobs(tmp_path))}
    assert kinds == {"trained": "training", "compared": "comparison", "slimmed": "slim", "a model": "model"}


DAMAGES: dict[str, Any] = {
    "empty": b"", "half": b'{"base": "smo', "a list": b"[1, 2]", "binary": b"\xff\xfe\x00\x01", "null": b"null",
    "deep": b"[" * 20_000, "wrong types": json.dumps(
        {"base": [1], "method": {"a": 1}, "final_loss": "low", "seconds": "long", "scores": 3, "tokens_per_second": {}}
    ).encode(), "not finite": b'{"final_loss": NaN, "eval_loss": Infinity, "scores": {"a": NaN}}',
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", ["results.json", "recipe.yaml", "loss.jsonl", "samples.jsonl"])
def test_a_damaged_folder_is_a_sentence_and_no_failure(tmp_path: Path, file: str, damage: bytes) -> None:
    write_run(tmp_path / "run")
    write_run(tmp_path / "whole")
    (tmp_path / "run" / file).write_bytes(damage)
    client = open_studio(tmp_path)
    for path in ("/", "/runs/run", "/curves?name=run&name=whole"):
        answer = client.get(path)
        assert answer.status_code == 200, path
        assert "whole" in answer.text or path == "/runs/run"
    if file == "results.json" and damage not in (DAMAGES["wrong types"], DAMAGES["not finite"]):
        assert "run/results.json can&#39;t be read" in client.get("/").text


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", ["run.json", "lock", "progress.json", "checkpoint-1"])
def test_a_damaged_folder_of_a_run_under_way_is_no_failure(tmp_path: Path, file: str, damage: bytes) -> None:
    under_way = tmp_path / "run.run"
    under_way.mkdir()
    (under_way / file).write_bytes(damage)
    client = open_studio(tmp_path)
    assert client.get("/").status_code == 200
    assert client.get("/runs/run").status_code == 200
    assert client.post("/runs/run/resume").status_code == 422
    assert client.post("/runs/run/delete").headers["hx-redirect"] == "/"
    assert not under_way.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_a_sentence(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run").chmod(0)
    try:
        assert open_studio(tmp_path).get("/").status_code == 200
    finally:
        (tmp_path / "run").chmod(0o700)


@pytest.mark.parametrize(
    "name",
    ["..", ".", "../run", "a/b", "/etc", "..\\run", "a\\b", ".studio", "run\0", "run.run", "", "x" * 300, "a\nb"],
)
def test_a_name_that_leads_elsewhere_is_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(NoSuchRunError):
        run_path(tmp_path, name)


@pytest.mark.parametrize("name", ["..%2Foutside", "%2e%2e%2foutside", "..%5Coutside", "%2Fetc", "linked"])
def test_nothing_outside_of_the_folder_is_shown_or_deleted(tmp_path: Path, name: str) -> None:
    write_run(tmp_path / "outside")
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "linked").symlink_to(tmp_path / "outside")
    client = open_studio(runs)
    for path in (f"/runs/{name}", f"/runs/{name}/events", f"/curves?name={name}", f"/train/recipes/{name}"):
        answer = client.get(path)
        assert answer.status_code in (404, 422), path
        assert "final_loss" not in answer.text
    for action in ("delete", "stop", "resume"):
        assert client.post(f"/runs/{name}/{action}").status_code == 404
    assert (tmp_path / "outside" / "results.json").is_file()


def test_deleting_a_run_leaves_what_its_links_lead_to(tmp_path: Path) -> None:
    runs, data = tmp_path / "runs", tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("mine")
    write_run(runs / "done")
    write_run(runs / "other")
    (runs / "done" / "data").symlink_to(data)
    (runs / "done.run").mkdir()
    client = open_studio(runs)
    assert client.post("/runs/done/delete").headers["hx-redirect"] == "/"
    assert states(runs) == {"other": "done"}
    assert not (runs / "done.run").exists()
    assert (data / "train.jsonl").read_text() == "mine"
    assert client.get("/runs/done").status_code == 404


def test_a_search_looks_at_names_models_methods_and_states(tmp_path: Path) -> None:
    write_run(tmp_path / "orders", base="smollm2", method="dora")
    write_run(tmp_path / "reviews", base="minilm", method="ia3")
    client = open_studio(tmp_path)
    for words, expected in {"ORD": "orders", "minilm": "reviews", "done dora": "orders", "": "both"}.items():
        page = client.get("/", params={"search": words}).text
        assert ('href="/runs/orders"' in page) == (expected in ("orders", "both")), words
        assert ('href="/runs/reviews"' in page) == (expected in ("reviews", "both")), words
    assert "No run has these words" in client.get("/", params={"search": "bert"}).text


def test_chosen_runs_are_drawn_over_each_other_and_their_recipes_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "one", losses=[3.0, 2.0], rank=8)
    write_run(tmp_path / "two", losses=[3.0, 1.0], rank=64)
    page = open_studio(tmp_path).get("/curves?name=one&name=two").text
    assert "one, Loss" in page
    assert "two, Loss" in page
    assert "<code>method.r</code>" in page
    assert '<td class="mono">8</td><td class="mono">64</td>' in page
    assert "model.name" not in page
    assert "Choose some runs" in open_studio(tmp_path).get("/curves").text


def test_a_name_is_shown_as_text(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    write_run(tmp_path / name, base='"><script>alert(1)</script>')
    client = open_studio(tmp_path)
    for path in ("/", f"/runs/{name}", f"/curves?name={name}"):
        page = client.get(path).text
        assert "<img src=x" not in page
        assert "<script>alert" not in page


def test_runs_are_listed_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from slimtune.studio.app import build_app; from fastapi.testclient import TestClient; "
        "from pathlib import Path; c = TestClient(build_app(Path(sys.argv[1])), base_url='http://127.0.0.1'); "
        "assert c.get('/').status_code == 200; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
