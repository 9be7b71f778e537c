"""A studio without a server, as a page of its own would speak to it."""

from __future__ import annotations

from pathlib import Path

from fastapi.testclient import TestClient

from slimtune.studio.app import build_app
from slimtune.studio.security import TOKEN_HEADER, Access

ORIGIN = "http://127.0.0.1:8100"


def open_studio(folder: Path, access: Access | None = None, language: str = "en") -> TestClient:
    """A client with the token of the pages."""
    access = access or Access()
    headers = {TOKEN_HEADER: access.token, "accept-language": language}
    return TestClient(build_app(folder, access), base_url=ORIGIN, headers=headers)
