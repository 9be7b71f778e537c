"""The page Data: a file is kept as it is sent, and the page says what `slimtune data preview` says."""

from __future__ import annotations

import filecmp
import json
import re
import time
from pathlib import Path

import psutil
import pytest
from fastapi.testclient import TestClient

from browser import browser
from slimtune.errors import ConfigError
from slimtune.studio.security import Access
from slimtune.studio.uploads import safe_name
from small_text_model import save_base, write_lines
from studio_browser import PHONE, check_accessible, listening_studio, started, tab, tab_of
from studio_client import awaited, open_studio

ROWS = [{"question": f"What is {number}?", "answer": f"It is {number}."} for number in range(30)]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    return open_studio(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("orders.jsonl", "orders.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\my orders (1).csv", "my_orders_1_.csv"),
        (".hidden.jsonl", "hidden.jsonl"),
        ("--help.json", "help.json"),
        ("주문.jsonl", "주문.jsonl"),
        ("a\x00b\n.txt", "a_b_.txt"),
    ],
)
def test_a_name_leads_nowhere_else(name: str, kept: str) -> None:
    assert safe_name(name) == kept


@pytest.mark.parametrize("name", ["", "..", "/", "---", "..//..", "?"])
def test_a_name_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="rename it"):
        safe_name(name)


def test_a_file_is_kept_as_it_was_sent_once(tmp_path: Path) -> None:
    client = open_studio(tmp_path)
    content = b'{"text": "a"}\n' * 100_000
    chunks = (content[at : at + 65536] for at in range(0, len(content), 65536))
    first = client.post("/data/files", params={"name": "../a b.jsonl"}, content=chunks).json()["path"]
    assert Path(first) == tmp_path / "data" / "a_b.jsonl"
    assert Path(first).read_bytes() == content
    again = client.post("/data/files", params={"name": "a b.jsonl"}, content=content).json()["path"]
    assert again == first
    other = client.post("/data/files", params={"name": "a b.jsonl"}, content=b"{}").json()["path"]
    assert Path(other).name == "a_b-2.jsonl"
    assert Path(first).read_bytes() == content
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["a_b-2.jsonl", "a_b.jsonl"]


def test_what_is_empty_or_too_large_leaves_nothing(tmp_path: Path) -> None:
    client = open_studio(tmp_path, Access(max_upload=100_000))
    empty = client.post("/data/files", params={"name": "a.jsonl"}, content=b"")
    assert (empty.status_code, "choose a file with rows" in empty.text) == (422, True)
    chunks = (b"x" * 50_000 for _ in range(4))
    assert client.post("/data/files", params={"name": "a.jsonl"}, content=chunks).status_code == 413
    assert list((tmp_path / "data").iterdir()) == []


def test_the_folder_of_data_is_no_run(tmp_path: Path) -> None:
    client = open_studio(tmp_path)
    client.post("/data/files", params={"name": "a.jsonl"}, content=b"{}")
    assert "No runs yet" in client.get("/").text


def test_a_page_says_what_the_command_says(client: TestClient, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", *ROWS, ROWS[0])
    page = awaited(client, "/data/preview", **{"data.train": str(path)})
    assert f"slimtune data preview {path}" in page
    assert "prompt-completion" in page
    assert re.search(r"repeated rows: 1 of 31", page)
    assert "It is 0." in page
    # What is learned is marked, and said for those who don't see it.
    assert re.search(r"<mark><span class=\"unseen\">\[learned: </span>It is 0\.", page)
    # The columns as they were found can be chosen otherwise.
    assert re.search(
        r'name="data.fields.prompt">\s*<option value="">.*?<option selected>question</option>', page, re.DOTALL
    )
    assert f"data.train={str(path).replace('/', '%2F')}" in page


def test_columns_are_chosen_and_go_into_the_command(client: TestClient, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "other.jsonl", {"a": "What is it?", "b": "It is this."})
    refused = awaited(client, "/data/preview", **{"data.train": str(path)})
    assert "which is no format of task" in refused
    assert "--field prompt=COLUMN" in refused
    half = awaited(client, "/data/preview", **{"data.train": str(path), "data.format": "prompt-completion"})
    assert re.search(r'name="data.fields.completion">.*?<option>b</option>', half, re.DOTALL)
    fields = {"data.fields.prompt": "a", "data.fields.completion": "b"}
    page = awaited(client, "/data/preview", **{"data.train": str(path), "data.format": "prompt-completion", **fields})
    assert "--format prompt-completion --field prompt=a --field completion=b" in page
    assert "data.fields=%7B%22prompt%22%3A+%22a%22" in page
    assert "It is this." in page


def test_mistakes_are_the_sentences_of_the_library(client: TestClient, tmp_path: Path) -> None:
    page = awaited(client, "/data/preview", **{"data.train": str(tmp_path / "missing.jsonl")})
    assert "it is not there; pass a file" in page
    bad = client.get("/data/preview", params={"data.train": "x", "data.max_length": "1"}, headers={"hx-request": "1"})
    assert (bad.status_code, bad.headers["hx-retarget"]) == (422, "#notice")
    assert "whole number of at least 2" in bad.text


def test_text_of_a_file_is_no_html(client: TestClient, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "evil.jsonl", {"prompt": "<script>alert(1)</script>", "completion": "<b>x</b>"})
    page = awaited(client, "/data/preview", **{"data.train": str(path)})
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_large_file_shows_its_first_rows_at_once(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimtune.studio.pages import data

    monkeypatch.setattr(data, "LARGE", 100)
    monkeypatch.setattr(data, "FIRST_ROWS", 7)
    path = write_lines(tmp_path / "large.jsonl", *ROWS)
    seen, page = set(), ""
    for _ in range(600):
        page = client.get("/data/preview", params={"tab": "1", "data.train": str(path)}).text
        seen.add("first 7 rows" in page)
        if "hx-trigger" not in page:
            break
        time.sleep(0.02)
    assert "first 7 rows" not in page
    assert re.search(r"<dd>30</dd>", page)


def test_a_name_like_an_option_is_a_name(client: TestClient) -> None:
    page = awaited(client, "/data/preview", **{"data.train": "--help"})
    assert "--help" in page
    assert "it is not there" in page or "no file" in page


def test_a_file_is_dropped_and_its_limit_moves_in_a_browser(tmp_path: Path) -> None:
    model = save_base(tmp_path / "model")
    path = write_lines(tmp_path / "pairs.jsonl", *ROWS)
    with browser() as opened, listening_studio(tmp_path / "runs") as url, tab_of(opened, PHONE) as page:
        page.goto(f"{url}/data?model.name={model}")
        page.locator("input[type=file]").set_input_files(path)
        page.locator("#samples").wait_for()
        assert page.get_by_label("Or name it").input_value() == str(tmp_path / "runs" / "data" / "pairs.jsonl")
        assert page.locator("mark", has_text="It is 0.").count() == 1
        page.get_by_label("Longest, in tokens").fill("4")
        page.get_by_label("Examples at once").focus()
        page.get_by_text("Training refuses them").wait_for()
        page.locator(".waiting").wait_for(state="detached")
        check_accessible(page)
        assert "data.max_length=4" in page.url


def test_a_file_that_is_too_large_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", *ROWS)
    access = Access(max_upload=path.stat().st_size - 1)
    with browser() as opened, listening_studio(tmp_path / "runs", access) as url, tab(opened) as seen:
        page, sent = seen.page, []
        page.on("request", lambda asked: sent.append(asked.url) if asked.method == "POST" else None)
        page.goto(f"{url}/data")
        page.locator("input[type=file]").set_input_files(path)
        page.get_by_text("larger than the studio takes; name it by its path").wait_for()
        assert sent == []
        # What is lost on the way is said as well.
        write_lines(path, ROWS[0])
        page.route("**/data/files*", lambda route: route.abort())
        page.locator("input[type=file]").set_input_files(path)
        page.get_by_text("Is the studio still running?").wait_for()
        assert page.get_by_label("Or name it").input_value() == ""


@pytest.mark.soak
def test_a_file_of_200_mb_is_looked_at_and_never_held_by_the_studio(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    line = json.dumps({"prompt": "What is it? " * 40, "completion": "It is this. " * 40}) + "\n"
    rows = 200_000_000 // len(line) + 1
    with path.open("w") as file:
        file.writelines(line.replace("this", f"{number:04}", 1) for number in range(rows))
    with browser() as opened, started(tmp_path / "runs") as (server, url), tab_of(opened) as page:
        page.set_default_timeout(900_000)
        page.goto(f"{url}/data?data.train=&model.name=")
        # A small one first, for which the libraries are imported that show examples.
        page.locator("input[type=file]").set_input_files(write_lines(tmp_path / "small.jsonl", *ROWS))
        page.locator(".samples").wait_for()
        before = peak_bytes(server.pid)
        page.locator("input[type=file]").set_input_files(path)
        # The first rows are there while the others are read.
        page.get_by_text("These are the first 200 rows").wait_for()
        assert page.locator("dd", has_text="of the first rows").inner_text().startswith("200")
        page.locator(".waiting").wait_for(state="detached")
        assert page.locator("dd", has_text=re.compile(f"^{rows:,}$")).count() == 1
        kept = tmp_path / "runs" / "data" / "large.jsonl"
        assert page.get_by_label("Or name it").input_value() == str(kept)
        assert filecmp.cmp(path, kept, shallow=False)
        # A copy of the file, or of a tenth of it, would be more.
        assert peak_bytes(server.pid) - before < 20_000_000
        # Those that read it have ended: nothing is forked now from the process that has the library ready.
        assert [reader for child in psutil.Process(server.pid).children() for reader in child.children()] == []


def peak_bytes(pid: int) -> int:
    """The most main memory that a process ever had."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
