"""A server on this machine that speaks of the Hub's API what `huggingface_hub` and `datasets` need to read from it.

Repositories are folders, `ROOT/models/organisation/name/REVISION` and `ROOT/datasets/organisation/name/REVISION`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@contextmanager
def serving(root: Path, handler: type[Hub] | None = None) -> Iterator[str]:
    """The address under which the repositories in a folder are served."""
    handler = handler or Hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, root))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()


def commit_of(snapshot: Path) -> str:
    """What the server calls the commit of a revision."""
    return hashlib.sha1(str(snapshot.resolve()).encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, root: Path, *args: Any) -> None:
        self.root = root
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is written to the screen of the test."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        self._answer(set(said.get("paths", ())))

    def _answer(self, wanted: set[str] | None = None) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(
            r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(revision|tree|paths-info)/(.+))?", path
        ):
            kind, name, what, rest = found.groups()
            self._api(kind, name, what, rest, wanted)
        elif found := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, file = found.groups()
            self._file((kind or "models/").rstrip("/"), name, revision, file)
        else:
            self._refuse("RepoNotFound")

    def _api(self, kind: str, name: str, what: str | None, rest: str | None, wanted: set[str] | None) -> None:
        revision, _, inside = (rest or "main").partition("/") if what != "revision" else (rest, "", "")
        snapshot = self._snapshot(kind, name, revision or "main")
        if snapshot is None:
            return
        files = [path for path in sorted(snapshot.rglob("*")) if path.is_file()]
        if what in ("tree", "paths-info"):
            told = [self._told(path, snapshot) for path in files]
            told = [item for item in told if item["path"].startswith(inside)]
            self._json([item for item in told if wanted is None or item["path"] in wanted], snapshot)
            return
        self._json(
            {
                "_id": "0", "id": name, "sha": commit_of(snapshot), "private": self.is_private(name),
                "gated": False, "disabled": False,
                "downloads": 0, "likes": 0, "tags": [], "cardData": {}, "lastModified": "2026-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": str(path.relative_to(snapshot))} for path in files],
            },
            snapshot,
        )  # fmt: skip

    def _told(self, path: Path, snapshot: Path) -> dict[str, Any]:
        return {
            "type": "file", "path": str(path.relative_to(snapshot)), "size": path.stat().st_size, "oid": _etag(path),
        }  # fmt: skip

    def _file(self, kind: str, name: str, revision: str, file: str) -> None:
        snapshot = self._snapshot(kind, name, revision)
        if snapshot is None:
            return
        path = snapshot / file
        if not path.is_file():
            self._refuse("EntryNotFound", commit_of(snapshot))
            return
        content, size = path.read_bytes(), path.stat().st_size
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status, extra = 200, {}
        if part:
            first, last = int(part[1]), min(int(part[2] or size - 1), size - 1)
            content, status = content[first : last + 1], 206
            extra = {"Content-Range": f"bytes {first}-{last}/{size}"}
        self._send(status, content, {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": commit_of(snapshot), **extra})

    def is_private(self, name: str) -> bool:
        """Whether a repository is shown to its owners alone."""
        return False

    def _snapshot(self, kind: str, name: str, revision: str) -> Path | None:
        """The folder of a branch or a commit; where there is none that is answered."""
        repository = self.root / kind / name
        if not repository.is_dir():
            self._refuse("RepoNotFound")
            return None
        found = [path for path in repository.iterdir() if revision in (path.name, commit_of(path))]
        if not found:
            self._refuse("RevisionNotFound")
        return found[0] if found else None

    def _json(self, value: Any, snapshot: Path) -> None:
        self._send(
            200, json.dumps(value).encode(), {"Content-Type": "application/json", "X-Repo-Commit": commit_of(snapshot)}
        )

    def _refuse(self, code: str, commit: str | None = None) -> None:
        # As the Hub does it, which doesn't say whether a repository is private or not there.
        status = 401 if code == "RepoNotFound" else 404
        self._send(status, b"", {"X-Error-Code": code, **({"X-Repo-Commit": commit} if commit else {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
