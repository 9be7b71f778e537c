"""Scratch files and folders: what a kill leaves goes at the next start, what a process still writes stays."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from killed import holding
from slimtune.errors import ConfigError
from slimtune.storage.atomic import refuse_existing, remove_left_behind, staged, staged_file, write_file

WRITES = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from slimtune.storage.atomic import staged, staged_file
with {kind}(Path(sys.argv[1])) as scratch:
    (scratch if scratch.is_file() else scratch / "file").write_text("half")
    print("there", flush=True)
    sys.stdin.read()
"""


def scratches(folder: Path) -> list[Path]:
    found = list(folder.glob(".out-*"))
    for path in found:
        os.utime(path, (0, 0))
    return found


@pytest.mark.parametrize(("kind", "context"), [("staged", staged), ("staged_file", staged_file)])
def test_what_a_kill_left_goes_and_what_is_being_written_stays(
    kind: str, context: Callable[..., Any], tmp_path: Path
) -> None:
    with holding(WRITES.format(kind=kind), tmp_path / "out") as process:
        (scratch,) = scratches(tmp_path)
        with context(tmp_path / "other"):
            pass
        remove_left_behind(tmp_path / "out")
        assert scratch.exists()
        process.kill()
        process.wait()
        assert scratch.exists()
    with context(tmp_path / "out") as own:
        assert not scratch.exists()
        assert own.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}


def test_what_somebody_else_called_alike_stays(tmp_path: Path) -> None:
    names = [
        ".out-original",
        ".out-backup12",
        ".out-abcdefgh.partial.txt",
        ".out2-abcdefgh.partial",
        ".out-ABC.partial",
    ]
    for name in names:
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    remove_left_behind(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_a_name_that_leaves_no_room_for_those_beside_it_is_refused_first(tmp_path: Path) -> None:
    most = os.pathconf(tmp_path, "PC_NAME_MAX") - 24
    with staged(tmp_path / ("x" * most)) as scratch:
        (scratch / "file").write_text("whole")
    for name in ("x" * (most + 1), "ö" * (most // 2 + 1), "x" * 300, f"{'x' * 300}/y"):
        with pytest.raises(ConfigError, match=f"choose one of at most {most}"):
            refuse_existing(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["x" * most]


# -- The swap of --overwrite.

SWAP = """
import os, shutil, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from slimtune.storage import atomic
output, at, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
calls = 0
def counted(owner, name):
    real = getattr(owner, name)
    def call(*args, **kwargs):
        global calls
        if swapping:
            if calls == at:
                os._exit(9)
            calls += 1
        return real(*args, **kwargs)
    setattr(owner, name, call)
swapping = False
for owner, name in ((os, "replace"), (os, "link"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (atomic, "_exchange")):
    counted(owner, name)
if how == "files":
    def refuse(one, other): raise OSError("no exchange here")
    atomic._exchange = refuse
with atomic.staged(output, overwrite=True) as folder:
    for name in ("adapter_config.json", "adapter_model.safetensors", "new.txt"):
        (folder / name).write_text("new")
    swapping = True
"""


def killed_swap(output: Path, at: int, how: str) -> int:
    """Killed before its n-th change of the disk; gives back how it ended."""
    command = [sys.executable, "-c", SWAP, str(output), str(at), how]
    return subprocess.run(command, capture_output=True, check=False).returncode


@pytest.mark.parametrize("how", ["exchange", "files"])
def test_a_kill_at_any_point_of_the_swap(how: str, tmp_path: Path) -> None:
    """The adapter is the old one or the new one; without an exchange in one step it may be none, but no mixture."""
    ends = []
    for at in range(60):
        output = tmp_path / str(at) / "out"
        (output / "mine").mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors", "notes.txt", "mine/photo"):
            (output / name).write_text("old")
        code = killed_swap(output, at, how)
        assert code in (0, 9)
        config, weights = output / "adapter_config.json", output / "adapter_model.safetensors"
        if how == "exchange" or config.is_file():
            assert config.read_text() == weights.read_text()
        assert (output / "notes.txt").read_text() == (output / "mine" / "photo").read_text() == "old"
        ends.append(config.read_text() if config.is_file() else "none")
        if code == 0:
            break
        os.utime(next(iter(output.parent.glob(".out-*")), output), (0, 0))
        assert killed_swap(output, 10_000, how) == 0
        assert config.read_text() == weights.read_text() == (output / "new.txt").read_text() == "new"
        assert (output / "notes.txt").read_text() == (output / "mine" / "photo").read_text() == "old"
        assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert code == 0
    assert len(ends) > 5
    assert ends[0] == "old"
    assert ends[-1] == "new"
    assert set(ends) == ({"old", "new"} if how == "exchange" else {"old", "none", "new"})


def test_a_folder_that_one_stands_in_is_not_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("old")
    monkeypatch.chdir(output)
    before = output.stat().st_ino
    with staged(Path(), overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert output.stat().st_ino == before
    assert Path("config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "config.json").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with staged(tmp_path / "link", overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").read_text() == "new"


def test_files_written_by_several_threads_leave_the_umask_of_the_process_alone(tmp_path: Path) -> None:
    def put_off(frame: Any, event: str, function: Any) -> None:
        # Between reading the umask, which sets it, and setting it back: other threads have their turn there.
        if event == "c_return" and function is os.umask:
            time.sleep(0.005)

    def write(number: int) -> None:
        write_file(tmp_path / str(number), "text")

    before = os.umask(0o027)
    threading.setprofile(put_off)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, range(12)))
    finally:
        threading.setprofile(None)
        after = os.umask(before)
    assert oct(after) == "0o27"
    assert {oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()} == {"0o640"}
