"""Pushing to a server that speaks the Hub's API, by the real client, in a process of its own; and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slimtune.errors import AdapterFileError, PushError, SlimtuneError
from slimtune.storage.push import contents_of
from small_hub import serving
from writable_hub import WritableHub

SCRIPT = """
import json, sys
from pathlib import Path
from typer.testing import CliRunner
import slimtune
from slimtune.cli import app
results = []
for token, arguments in json.loads(sys.argv[1]):
    if arguments[0] == "config":
        slimtune.LoraConfig(r=3).push_to_hub("me/config", token=token)
        arguments = ["methods"]
    result = CliRunner().invoke(app, arguments, env={"HF_TOKEN": token or None})
    results.append({"exit_code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr})
Path(sys.argv[2]).write_text(json.dumps(results))
"""


@dataclass(frozen=True)
class Remote:
    """A served folder of repositories, and commands that were run against it."""

    root: Path
    results: dict[str, dict[str, Any]]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        folder = self.root / "models" / name / revision
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def sentence(self, name: str, exit_code: int) -> str:
        result = self.results[name]
        assert result["exit_code"] == exit_code, result
        (said,) = [line for line in result["stderr"].splitlines() if line.startswith("slimtune: ")]
        return said


def carry_out(folder: Path, address: str, commands: dict[str, tuple[str, list[str]]]) -> dict[str, Any]:
    """Run commands, each with its token, in one process that takes the address for the Hub's."""
    left = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    hub = {"HF_ENDPOINT": address, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(list(commands.values())), str(folder / "out.json")],
        capture_output=True, text=True, timeout=240, check=False, cwd=folder, env=left | hub,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return dict(zip(commands, json.loads((folder / "out.json").read_text()), strict=True))


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path, tuned: Path) -> Remote:
    folder = tmp_path_factory.mktemp("push")
    for name in ("ours/read-only", "ours/public"):
        (folder / "served" / "models" / name / "main").mkdir(parents=True)
    shutil.copytree(tuned, folder / "tuned")
    (folder / "tuned" / "checkpoint-4").mkdir()
    (folder / "tuned" / "checkpoint-4" / "optimizer.pt").write_bytes(b"pickled")
    train = ["train", str(base), str(data), "--max-steps", "1", "--rank", "2", "model.device=cpu"]
    push = ["push", "tuned", "tuned"]
    commands = {
        "push": ("hf_writes", [*push, "--private", "--json"]),
        "again": ("hf_writes", ["push", "tuned", "me/tuned"]),
        "branch": ("hf_writes", ["push", "tuned", "me/tuned", "--revision", "v2"]),
        "model": ("hf_writes", ["push", str(base), "ours/base", "--json"]),
        "train": ("hf_writes", [*train, "--output", "new", "--push-to-hub", "ours/new", "--json"]),
        "train, refused": ("hf_writes", [*train, "--output", "kept", "--push-to-hub", "me/full", "--json"]),
        "refused": ("hf_writes", ["push", "tuned", "ours/read-only"]),
        "not ours": ("hf_writes", ["push", "tuned", "theirs/tuned"]),
        "public": ("hf_writes", ["push", "tuned", "ours/public", "--private"]),
        "no name": ("hf_writes", ["train", "nothing", "x.jsonl", "--output", "x", "--push-to-hub", "a/b/c"]),
        "config": ("hf_writes", ["config"]),
        "reads": ("hf_reads", push),
        "unknown": ("hf_unknown", push),
        "no token": ("", push),
    }
    with serving(folder / "served", WritableHub) as address:
        results = carry_out(folder, address, commands)
    # Nobody listens there any more.
    results |= carry_out(folder, address, {"no hub": ("hf_writes", push)})
    return Remote(folder / "served", results)


def test_an_adapter_is_pushed_as_it_stands(remote: Remote, tuned: Path) -> None:
    result = remote.results["push"]
    assert result["exit_code"] == 0, result
    said = json.loads(result["stdout"])
    expected = {path.name: path.read_bytes() for path in tuned.iterdir()}
    assert remote.files("me/tuned") == expected
    assert (said["repository"], said["revision"]) == ("me/tuned", "main")
    assert said["bytes"] == sum(map(len, expected.values()))
    assert (set(said["files"]), said["left_out"]) == (set(expected), ["checkpoint-4"])
    assert "me/tuned" in WritableHub.private
    assert "a folder of this machine" in result["stderr"]


def test_what_is_there_is_pushed_again_and_to_a_branch(remote: Remote) -> None:
    assert "pushed to http" in remote.results["again"]["stdout"]
    assert remote.results["branch"]["exit_code"] == 0, remote.results["branch"]
    assert remote.files("me/tuned", "v2") == remote.files("me/tuned")


def test_a_model_is_pushed(remote: Remote, base: Path) -> None:
    assert remote.results["model"]["exit_code"] == 0, remote.results["model"]
    assert remote.files("ours/base") == {path.name: path.read_bytes() for path in base.iterdir()}


def test_a_training_is_pushed_in_the_end(remote: Remote) -> None:
    result = remote.results["train"]
    assert result["exit_code"] == 0, result
    said = json.loads(result["stdout"])
    assert said["pushed"].endswith("/ours/new")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "recipe.yaml"} <= set(
        remote.files("ours/new")
    )


def test_a_config_is_pushed_alone(remote: Remote) -> None:
    assert json.loads(remote.files("me/config")["adapter_config.json"])["r"] == 3


def test_a_refusal_says_why(remote: Remote) -> None:
    assert "answered 403 (you have no write access to ours/read-only)" in remote.sentence("refused", 1)
    assert "can only be made under me, ours" in remote.sentence("not ours", 1)
    assert "exists and is public" in remote.sentence("public", 2)
    assert "'a/b/c' can't be the name of a repository" in remote.sentence("no name", 2)
    assert "may only read" in remote.sentence("reads", 1)
    assert "answered 401" in remote.sentence("unknown", 1)
    assert "log in with hf auth login" in remote.sentence("no token", 2)
    assert "go online" in remote.sentence("no hub", 1)


def test_a_push_that_fails_leaves_the_training(remote: Remote) -> None:
    """The Hub lets the repository be made, and takes no commit once the training is through."""
    said = remote.sentence("train, refused", 1)
    assert "the training is whole and in kept" in said
    assert "your storage is full" in said
    assert said.endswith("slimtune push kept me/full")
    assert (remote.root.parent / "kept" / "adapter_model.safetensors").is_file()
    assert json.loads(remote.results["train, refused"]["stdout"])["pushed"] is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (".env", b"A=1", "looks like a secret"),
        ("server.pem", b"", "looks like a secret"),
        ("notes.md", b"use hf_" + b"a1" * 17, "looks like a token"),
        ("run.sh", b"-----BEGIN RSA PRIVATE KEY-----", "looks like a token or a private key"),
        ("training_args.bin", b"", "pickled files"),
        ("sub/state.pt", b"", "pickled files"),
    ],
)
def test_secrets_and_pickles_are_refused(tmp_path: Path, tuned: Path, name: str, content: bytes, said: str) -> None:
    folder = tmp_path / "tuned"
    shutil.copytree(tuned, folder)
    contents_of(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(PushError, match=said) as caught:
        contents_of(folder)
    assert "a1a1" not in str(caught.value)


@pytest.mark.parametrize("files", [[], ["run.json", "lock"], ["adapter_config.json"], ["config.json", "x.bin"]])
def test_a_folder_without_weights_is_refused(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(AdapterFileError, match="neither an adapter nor a model"):
        contents_of(tmp_path)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SlimtuneError, match="there is no folder"):
        contents_of(tmp_path / "nothing")
