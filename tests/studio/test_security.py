"""What other sites, other hosts and other names can't do."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from slimtune.errors import ConfigError
from slimtune.studio.app import build_app
from slimtune.studio.pages import login
from slimtune.studio.security import MAX_FORM, Access, check_host, read_password
from studio_client import ORIGIN, open_studio


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "SECONDS_BEHIND_A_WRONG_ONE", 0.0)


def test_a_page_says_what_browsers_are_to_refuse(tmp_path: Path) -> None:
    headers = open_studio(tmp_path).get("/").headers
    policy = headers["content-security-policy"]
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", ["/", "/login", "/static/studio.css"])
@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8100", "localhost.evil.example", ""])
def test_a_name_that_was_made_to_point_here_gets_nothing(tmp_path: Path, path: str, host: str) -> None:
    client = open_studio(tmp_path)
    refused = client.get(path, headers={"host": host})
    assert refused.status_code == 403
    assert client.app.state.studio.access.token not in refused.text  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("host", ["127.0.0.1:8100", "localhost", "LOCALHOST:1", "[::1]:8100"])
def test_its_own_names_are_answered(tmp_path: Path, host: str) -> None:
    assert open_studio(tmp_path).get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_a_post_from_another_origin_is_refused_even_with_the_token(tmp_path: Path, headers: dict[str, str]) -> None:
    client = open_studio(tmp_path)
    refused = client.post("/login", headers=headers)
    assert refused.status_code == 403
    assert "another site" in refused.text


@pytest.mark.parametrize("token", ["", "wrong"])
def test_a_post_without_the_token_is_refused(tmp_path: Path, token: str) -> None:
    client = open_studio(tmp_path)
    refused = client.post("/login", headers={"x-csrf-token": token})
    assert refused.status_code == 403
    assert "older than the server" in refused.text


def test_a_body_is_bounded_whether_it_says_its_length_or_not(tmp_path: Path) -> None:
    client = open_studio(tmp_path, Access(password="a password"))
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/login", content=b"password=" + b"x" * MAX_FORM, headers=form).status_code == 413
    chunks = (b"x" * 100_000 for _ in range(20))
    assert client.post("/login", content=chunks, headers=form).status_code == 413
    assert client.post("/login", content=b"password=wrong", headers=form | {"content-length": "-5"}).status_code == 413


def test_without_a_password_another_host_is_refused() -> None:
    for host in ("0.0.0.0", "192.168.1.2", "example.com", "::"):
        with pytest.raises(ConfigError, match="--password-file"):
            check_host(host, None)
        check_host(host, "a password")
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        check_host(host, None)


def test_a_password_is_asked_for_and_opens(tmp_path: Path) -> None:
    client = open_studio(tmp_path, Access(password="open sesame", is_local=False))
    first = client.get("/", headers={"host": "workstation:8100"}, follow_redirects=False)
    assert (first.status_code, first.headers["location"]) == (303, "/login")
    assert client.get("/", headers={"hx-request": "true"}).status_code == 401
    assert client.post("/login", data={"password": "guess"}).status_code == 403
    assert client.get("/", follow_redirects=False).status_code == 303
    client.cookies.set("slimtune-studio", "0" * 64)
    assert client.get("/", follow_redirects=False).status_code == 303
    client.cookies.clear()
    own = {"origin": ORIGIN, "sec-fetch-site": "same-origin"}
    opened = client.post("/login", data={"password": "open sesame"}, headers=own)
    assert opened.headers["hx-redirect"] == "/"
    assert "HttpOnly" in opened.headers["set-cookie"]
    assert "SameSite=strict" in opened.headers["set-cookie"]
    assert client.get("/", follow_redirects=False).status_code == 200


def test_a_password_file_is_read_and_a_short_one_refused(tmp_path: Path) -> None:
    file = tmp_path / "password"
    with pytest.raises(ConfigError, match="can't be read"):
        read_password(file)
    file.write_text("short\n")
    with pytest.raises(ConfigError, match="5 characters"):
        read_password(file)
    file.write_text("long enough\nwhat else\n")
    assert read_password(file) == "long enough"


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(ConfigError, match="can't be made"):
        build_app(tmp_path / "runs")


def test_a_failure_is_a_sentence_with_the_headers_of_every_page(tmp_path: Path) -> None:
    app = build_app(tmp_path)

    def fail() -> None:
        raise RuntimeError("a bug")

    app.add_api_route("/broken", fail)
    answer = TestClient(app, base_url=ORIGIN, raise_server_exceptions=False).get("/broken")
    assert answer.status_code == 500
    assert "The studio failed" in answer.text
    assert "a bug" not in answer.text
    assert "script-src 'self'" in answer.headers["content-security-policy"]
