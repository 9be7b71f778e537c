"""The chat: which adapters belong to which base, the server behind it, and the page in a browser."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from browser import browser
from slimtune.studio import chat_server
from slimtune.studio.chat_server import ChatServer, find_bases, keep
from slimtune.studio.jobs import Process
from small_server import wait_until
from studio_browser import PHONE, check_accessible, listening_studio, tab_of
from studio_client import open_studio
from studio_runs import answering, rename_base, save_runs

HELLO = [{"role": "user", "content": "two apples"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_runs(tmp_path_factory.mktemp("chat"))


def ask(client: Any, base: Any, adapter: str = "", **request: Any) -> list[Any]:
    """The data of the events of an answer; words of its states among them."""
    body = {"base": str(base), "adapter": adapter, "request": {"messages": HELLO, "max_tokens": 4, "seed": 0} | request}
    answer = client.post("/chat/answer", json=body)
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) if line.startswith("{") else line for line in lines]


def written(events: list[Any]) -> str:
    return "".join(
        choice["delta"].get("content", "") for event in events if isinstance(event, dict) for choice in event["choices"]
    )


def test_adapters_stand_with_the_base_that_their_files_name(tmp_path: Path) -> None:
    base, runs = save_runs(tmp_path, "orders", "labels", "elsewhere")
    rename_base(runs / "labels", str(base), task_type="SEQ_CLS")
    rename_base(runs / "elsewhere", "smollm2-135m-instruct")
    (runs / "merged").mkdir()
    (runs / "merged" / "config.json").write_text("{}")
    (runs / "damaged").mkdir()
    (runs / "damaged" / "adapter_config.json").write_text("{")
    bases = find_bases(runs)
    assert bases.adapters == {str(base): ["orders"], "smollm2-135m-instruct": ["elsewhere"]}
    assert [path.name for path in bases.models] == ["merged"]
    assert [fault.partition(":")[0] for fault in bases.faults] == ["damaged"]
    page = open_studio(runs).get("/chat", params={"base": str(base)}).text
    assert '<option value="orders" selected>' in page
    assert '"elsewhere"' not in page
    assert "damaged: " in page


def test_a_folder_without_runs_still_offers_a_model(tmp_path: Path) -> None:
    assert open_studio(tmp_path).get("/chat").status_code == 200
    assert open_studio(tmp_path).get("/chat?base=").status_code == 200


def test_answers_come_through_from_a_server_that_is_found_on_disk(made: tuple[Path, Path]) -> None:
    base, runs = made
    with answering(runs, base):
        client = open_studio(runs)
        assert "tiny is loaded" in client.get("/chat/server").text
        answers = {name: ask(client, base, name) for name in ("", "orders", "주문")}
        for events in answers.values():
            assert events[0] == "ready"
            assert events[-2]["usage"]["completion_tokens"] == 4
            assert events[-1] == "[DONE]"
        assert len({written(events) for events in answers.values()}) == 3
        refused = ask(client, base, max_tokens=0)[-1]
        assert "max_tokens" in refused["error"]["message"]


def test_an_adapter_that_was_trained_again_is_loaded_again(tmp_path: Path) -> None:
    base, runs = save_runs(tmp_path, "orders", "other")
    with answering(runs, base):
        client = open_studio(runs)
        before = written(ask(client, base, "orders"))
        later = time.time() + 5
        for path in (runs / "other").glob("adapter_*"):
            path.replace(runs / "orders" / path.name)
            os.utime(runs / "orders" / path.name, (later, later))
        assert written(ask(client, base, "orders")) != before


def test_what_is_no_run_is_not_asked(made: tuple[Path, Path]) -> None:
    base, runs = made
    client = open_studio(runs)
    for name in ("../tiny", "/etc", ".studio", "a/b"):
        body = {"base": str(base), "adapter": name, "request": {"messages": HELLO}}
        assert client.post("/chat/answer", json=body).status_code == 404
    assert client.post("/chat/answer", json={"request": {}}).status_code == 422


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    server, sentence = ChatServer(tmp_path), "no model 'nowhere'"
    server.folder.mkdir(parents=True)
    values = {"base": "nowhere", "key": "sk-1", "pid": 2**22 + 1, "began": 0.0}
    (server.folder / "server.json").write_text(json.dumps(values))
    (server.folder / "log").write_text(f"slimtune: {sentence}\n")
    assert server.state == "failed"
    assert sentence.replace("'", "&#39;") in open_studio(tmp_path).get("/chat/server").text
    server.stop()
    assert server.state == "stopped"


def test_a_name_is_never_taken_for_an_option(tmp_path: Path) -> None:
    assert ChatServer(tmp_path).arguments("--host=0.0.0.0")[-2:] == ["--", "--host=0.0.0.0"]
    assert ask(open_studio(tmp_path), " ")[-1]["error"]["message"].startswith("no base model")


def test_the_keeper_stops_what_nobody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_server, "_LOOK_SECONDS", 0.01)
    server = ChatServer(tmp_path)
    server.folder.mkdir(parents=True)
    for is_named in (True, False):
        # As a server does: what is started in the background of a script ignores Ctrl-C otherwise.
        code = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", code])
        process = Process.of(child.pid)
        assert process is not None
        if is_named:
            values = {"base": "tiny", "key": "sk-1", "pid": process.pid, "began": process.began}
            (server.folder / "server.json").write_text(json.dumps(values))
        (server.folder / "log").write_text("")
        # Nothing was ever asked; or another server took its place.
        keep(tmp_path, process, idle_seconds=0)
        assert child.wait(timeout=30) != 0
        assert server.state == "stopped"


def test_base_and_adapter_answer_side_by_side_in_a_browser(made: tuple[Path, Path]) -> None:
    base, runs = made
    server = ChatServer(runs)
    with browser() as opened, listening_studio(runs) as url:
        with tab_of(opened) as tab:
            tab.goto(f"{url}/chat")
            tab.fill("[name=max_tokens]", "6")
            tab.fill("[name=temperature]", "0")
            tab.fill("#message", "two apples")
            tab.keyboard.press("Enter")
            tab.wait_for_selector("#send:visible", timeout=120_000)
            # The question comes from the page; the server is a process of its own, which only the key opens.
            current = server.current
            assert current is not None
            assert current.base == str(base)
            assert httpx.get(f"{current.url}/v1/models", trust_env=False).status_code == 401
            figures = tab.locator(".figures").all_inner_texts()
            assert len(figures) == 2
            assert all(text.startswith("6 tokens") for text in figures)
            first, second = tab.locator(".assistant p:first-of-type").all_inner_texts()
            assert first != second
            # A studio that was killed in between finds it again.
            assert ChatServer(runs).is_ready(str(base))
            tab.click("#clear")
            assert tab.locator(".turn").count() == 0
            tab.click("#add")
            assert tab.locator("#columns [data-column]").count() == 3
            tab.fill("[name=max_tokens]", "400")
            tab.fill("#message", "and again")
            tab.keyboard.press("Enter")
            tab.locator(".assistant p").filter(has_text=re.compile(r"[\s\S]{20}")).first.wait_for()
            tab.click("#stop")
            tab.wait_for_selector("#send:visible")
            assert set(tab.locator(".figures").all_inner_texts()) == {"stopped"}
            tab.click("#server button")
            tab.wait_for_selector("#server .badge.queued")
        wait_until(lambda: not current.process.is_alive)


def test_a_conversation_outlives_its_page_and_stays_in_its_tab(made: tuple[Path, Path]) -> None:
    base, runs = made
    with browser() as opened, answering(runs, base), listening_studio(runs) as url, tab_of(opened) as tab:

        def type_in(text: str) -> None:
            tab.fill("#message", text)
            tab.keyboard.press("Enter")

        tab.goto(f"{url}/chat?adapter=orders")
        tab.fill("#system", "Be brief.")
        tab.fill("[name=max_tokens]", "4")
        # Drawn, an answer may end before its fourth token.
        tab.fill("[name=temperature]", "0")
        for count, text in enumerate(("two apples", "three pears"), 1):
            type_in(text)
            tab.locator(".figures", has_text="4 tokens").nth(2 * count - 1).wait_for()
            tab.locator("#send").wait_for()
        shown = tab.locator(".turn").all_inner_texts()
        tab.reload()
        assert tab.locator(".turn").all_inner_texts() == shown
        assert tab.locator("#columns select").evaluate_all("all => all.map(each => each.value)") == ["", "orders"]
        assert (tab.input_value("#system"), tab.input_value("[name=max_tokens]")) == ("Be brief.", "4")
        # What is asked next goes on where the conversation was; one without an answer goes back to where it was typed.
        tab.fill("[name=max_tokens]", "400")
        with tab.expect_request("**/chat/answer") as sent:
            type_in("and a plum")
        messages = sent.value.post_data_json["request"]["messages"]
        assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2, "user"]
        assert {key for message in messages for key in message} == {"role", "content"}
        tab.reload()
        assert tab.locator(".turn").all_inner_texts() == shown
        assert tab.input_value("#message") == "and a plum"
        # Another page leads here with an adapter: it stands beside what was asked before, empty.
        tab.goto(f"{url}/chat?adapter=주문")
        assert tab.locator("#columns select").evaluate_all("all => all.map(each => each.value)") == [
            "주문",
            "",
            "orders",
        ]
        assert tab.locator(".turn").all_inner_texts() == shown
        assert tab.locator("#columns .nothing").count() == 1
        other = tab.context.new_page()
        other.goto(f"{url}/chat")
        assert other.locator(".turn").count() == 0
        tab.click("#clear")
        tab.reload()
        assert tab.locator(".turn").count() == 0


@pytest.mark.parametrize(("language", "scheme"), [("en-US", "light"), ("ko-KR", "dark")])
def test_the_page_is_accessible_at_a_phone_and_at_a_desk(made: tuple[Path, Path], language: str, scheme: str) -> None:
    with browser() as opened, listening_studio(made[1]) as url:
        for options in ({"size": PHONE}, {}):
            with tab_of(opened, language=language, scheme=scheme, **options) as tab:
                tab.goto(f"{url}/chat")
                tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
                check_accessible(tab)
