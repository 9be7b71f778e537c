"""The small Hub with what `huggingface_hub` needs to push: who one is, new repositories, branches, files, commits.

It speaks the API's older way for large files (Git LFS), which the client takes with HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from small_hub import Hub

TOKENS = {"hf_writes": "write", "hf_reads": "read"}
"""Tokens of the user `me`, who is in the organisation `ours`, and what each may do."""


class WritableHub(Hub):
    """Repositories as folders, which are written, too.

    Attributes:
        private: those that were made private.
        read_only: those that nobody may commit to.
        full: those that take no commit, which shows at the commit alone.
    """

    private: ClassVar[set[str]] = set()
    read_only: ClassVar[set[str]] = {"ours/read-only"}
    full: ClassVar[set[str]] = {"me/full"}
    objects: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:  # noqa: N802
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            role = TOKENS.get(self.token)
            if role is None:
                return self._tell(401, {"error": "Invalid credentials"})
            auth = {"type": "access_token", "accessToken": {"role": role}}
            return self._tell(200, {"name": "me", "orgs": [{"name": "ours"}], "auth": auth})
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/auth-check/write", path):
            return self._tell(200, {}) if self._may_write(match[1]) else None
        return super().do_GET()

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            return self._tell(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return self._where_to_put(json.loads(body)["objects"])
        match = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(branch|preupload|commit)/(.+)", path)
        if match is None:
            wanted = json.loads(body or b"{}").get("paths", ())
            return self._answer(set(wanted))
        name, what, revision = match.groups()
        if not self._may_write(name):
            return None
        if what == "branch":
            target = self.root / "models" / name / revision
            if target.exists():
                return self._tell(409, {"error": "the branch exists"})
            shutil.copytree(self.root / "models" / name / "main", target)
            return self._tell(200, {})
        if what == "preupload":
            return self._how_to_send(json.loads(body)["files"])
        return self._commit(name, revision, [json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:  # noqa: N802
        self.objects[Path(self.path).name] = self.rfile.read(int(self.headers["Content-Length"]))
        self._tell(200, {})

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _may_write(self, name: str) -> bool:
        """Whether the repository is there and takes commits of this user; where not, that is answered."""
        if not (self.root / "models" / name).is_dir():
            self._refuse("RepoNotFound")
            return False
        if name in self.read_only or TOKENS.get(self.token) != "write":
            self._tell(403, {"error": f"you have no write access to {name}"})
            return False
        return True

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        folder = self.root / "models" / name / "main"
        if folder.exists():
            return self._tell(409, {"error": "You already created this model repo", "url": self._url(name)})
        folder.mkdir(parents=True)
        if wanted.get("visibility") == "private":
            self.private.add(name)
        return self._tell(200, {"url": self._url(name), "name": name})

    def _how_to_send(self, files: list[dict[str, Any]]) -> None:
        large = (".safetensors", ".png")
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self._tell(200, {"files": modes})

    def _where_to_put(self, objects: list[dict[str, Any]]) -> None:
        host = self.headers["Host"]
        where = [
            {**item, "actions": {"upload": {"href": f"http://{host}/objects/{item['oid']}"}}}
            for item in objects
            if item["oid"] not in self.objects
        ]
        self._tell(200, {"transfer": "basic", "objects": where})

    def _commit(self, name: str, revision: str, lines: list[dict[str, Any]]) -> None:
        if name in self.full:
            return self._tell(507, {"error": "your storage is full"})
        folder = self.root / "models" / name / revision
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.objects[value["oid"]]
            else:
                continue
            (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / value["path"]).write_bytes(content)
        return self._tell(200, {"commitUrl": f"{self._url(name)}/commit/1", "commitOid": "1" * 40})

    def _url(self, name: str) -> str:
        return f"http://{self.headers['Host']}/{name}"

    def _tell(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def is_private(self, name: str) -> bool:
        return name in self.private
