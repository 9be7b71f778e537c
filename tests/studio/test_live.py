"""A training from its start in the page to its end, with the server killed in the middle, and one from a terminal."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from browser import browser
from killed import finish, lines, start
from slimtune.cli import app
from slimtune.studio.history import read_run
from slimtune.studio.jobs import Jobs
from slimtune.studio.pages import runs as runs_page
from slimtune.train.run_folder import run_folder
from small_server import wait_until
from small_text_model import orders, save_base, write_lines
from studio_browser import listening_studio, started, tab
from studio_client import open_studio


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_base(folder / "base")
    write_lines(folder / "train.jsonl", *({"messages": example.messages()} for example in orders(40)))
    return folder


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


def words(files: Path, output: Path, steps: int = 60) -> list[str]:
    made = ["train", str(files / "base"), str(files / "train.jsonl"), "--output", str(output), "--rank", "4"]
    return [*made, "--batch-size", "2", "model.device=cpu", "data.held_out=0.1", f"training.max_steps={steps}"]


def events(text: str) -> list[dict[str, str]]:
    """Server-sent events by their fields."""
    found = []
    for block in filter(None, text.split("\n\n")):
        fields: dict[str, str] = {}
        for line in block.splitlines():
            name, _, value = line.partition(": ")
            fields[name] = f"{fields[name]}\n{value}" if name in fields else value
        found.append(fields)
    return found


@pytest.mark.slow
def test_a_killed_server_loses_nothing_and_the_page_goes_on(
    chromium: Any, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    with tab(chromium) as seen, tab(chromium) as other:
        page = seen.page
        with started(runs, directory=files) as (server, url):
            page.goto(f"{url}/train")
            page.get_by_label("Model", exact=True).first.fill("base")
            page.get_by_label("Data", exact=True).first.fill("train.jsonl")
            page.get_by_label("Name", exact=True).fill("mine")
            page.locator("summary", has_text="Training").click()
            for name, value in (("max_steps", 120), ("batch_size", 2), ("samples", 1), ("eval_steps", 60)):
                page.get_by_label(name, exact=True).first.fill(str(value))
            page.locator("#comes-to code", has_text="training.samples=1").wait_for()
            page.get_by_role("button", name="Start", exact=True).click()
            page.wait_for_url("**/runs/mine")
            page.locator("progress").wait_for()
            other.page.goto(f"{url}/runs/mine")
            page.locator("#facts dt", has_text="Time left").wait_for()
            page.locator("#chart canvas").wait_for()
            assert seen.problems == []
            seen.picture("run-live")
            server.kill()
            server.wait()
        run = read_run(runs, Jobs(runs), "mine")
        assert run.state == "running"
        # On the same port, as whoever starts it again would.
        with started(runs, httpx.URL(url).port or 0, files) as (_, again):
            assert again == url
            for each in (page, other.page):
                each.locator(".badge.done").wait_for()
                assert each.get_by_text("Step 60", exact=True).is_visible()
                assert each.get_by_role("button", name="Delete").is_visible()
        (job,) = Jobs(runs)
        assert job.exit_code == 0
    # What the page shows as a command does the same in a terminal, to the bit.
    monkeypatch.chdir(files)
    typed = shlex.split(job.command.replace(str(runs / "mine"), str(tmp_path / "typed")))
    done = CliRunner().invoke(app, typed[1:])
    assert done.exit_code == 0, done.output
    for name in ("adapter_model.safetensors", "adapter_config.json", "loss.jsonl", "samples.jsonl"):
        assert (tmp_path / "typed" / name).read_bytes() == (runs / "mine" / name).read_bytes(), name


def test_a_run_of_a_terminal_is_followed_stopped_and_gone_on_with(files: Path, tmp_path: Path) -> None:
    runs, screen = tmp_path / "runs", tmp_path / "screen"
    terminal = start(*words(files, runs / "theirs"), screen=screen)
    wait_until(lambda: lines(runs / "theirs.run" / "loss.jsonl") > 3 or not terminal.is_alive(), 120)
    assert terminal.is_alive(), screen.read_text()
    client = open_studio(runs)
    page = client.get("/runs/theirs").text
    assert 'class="badge running"' in page
    assert "/ 60" in page
    assert "Stop with a checkpoint" in page
    assert client.post("/runs/theirs/stop").status_code == 200
    terminal.join(120)
    assert terminal.exitcode == 130
    assert 'class="badge stopped"' in client.get("/runs/theirs").text
    run = read_run(runs, Jobs(runs), "theirs")
    resumed = runs_page.resume_arguments(run, runs)
    finish(*resumed, screen=screen)
    finish(*words(files, tmp_path / "unbroken"), screen=screen)
    for name in ("adapter_model.safetensors", "loss.jsonl"):
        assert (runs / "theirs" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name
    assert 'class="badge done"' in client.get("/runs/theirs").text


def test_events_go_on_where_a_page_stopped_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_page, "LOOK_SECONDS", 0.01)
    under_way = tmp_path / "mine.run"
    under_way.mkdir()
    losses = under_way / "loss.jsonl"
    losses.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0, "eval_loss": 2.5}\n{"step": 3, "lo')
    # Held by this process, so that it seems to train.
    with listening_studio(tmp_path) as url, run_folder(tmp_path / "mine", {}, True, False):
        with httpx.stream("GET", f"{url}/runs/mine/events", params={"at": "25-0"}) as answer:
            text = ""
            for piece in answer.iter_text():
                text += piece
                if "event: points" in text and text.endswith("\n\n"):
                    break
        (points,) = [event for event in events(text) if event.get("event") == "points"]
        assert json.loads(points["data"]) == [{"series": 0, "x": 2, "y": 2.0}, {"series": 1, "x": 2, "y": 2.5}]
        whole = losses.read_text().rindex("\n") + 1
        assert points["id"] == f"{whole}-0"
        with losses.open("a") as file:
            file.write('ss": 1.5}\n')
        headers = {"last-event-id": points["id"]}
        with httpx.stream("GET", f"{url}/runs/mine/events?at=0-0", headers=headers) as answer:
            text = ""
            for piece in answer.iter_text():
                text += piece
                if "event: points" in text and text.endswith("\n\n"):
                    break
        (points,) = [event for event in events(text) if event.get("event") == "points"]
        assert json.loads(points["data"]) == [{"series": 0, "x": 3, "y": 1.5}]
        losses.write_text('{"step": 1, "loss": 9.0}\n')
        with httpx.stream("GET", f"{url}/runs/mine/events", headers={"last-event-id": points["id"]}) as answer:
            text = ""
            for piece in answer.iter_text():
                text += piece
                if "#losses" in text and text.endswith("\n\n"):
                    break
        assert "9.0" in text


def test_a_run_is_followed_however_late_a_script_comes(chromium: Any, tmp_path: Path) -> None:
    def late(route: Any) -> None:
        time.sleep(0.5)
        route.continue_()

    (tmp_path / "mine.run").mkdir()
    with listening_studio(tmp_path) as url, run_folder(tmp_path / "mine", {}, True, False), tab(chromium) as seen:
        seen.page.route("**/hx-sse.min.js*", late)
        with seen.page.expect_request("**/runs/mine/events*", timeout=30_000):
            seen.page.goto(f"{url}/runs/mine")


def test_the_end_of_a_run_ends_its_events(tmp_path: Path) -> None:
    (tmp_path / "mine.run").mkdir()
    client = open_studio(tmp_path)
    (event,) = events(client.get("/runs/mine/events").text)
    assert event["data"].startswith('<hx-partial hx-target="#run" hx-swap="outerHTML">')
    assert "hx-sse" not in event["data"]
    assert client.get("/runs/other/events").status_code == 404
