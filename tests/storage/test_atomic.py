"""Scratch files and folders: what a kill leaves goes at the next start, what a process still writes stays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from slimtune.errors import ConfigError
from slimtune.storage.atomic import refuse_existing, remove_left_behind, staged, staged_file

WRITES = """
import os, sys
from pathlib import Path
from slimtune.storage.atomic import staged, staged_file
with {kind}(Path(sys.argv[1])) as scratch:
    (scratch if scratch.is_file() else scratch / "file").write_text("half")
    print("there", flush=True)
    sys.stdin.read()
"""


@contextmanager
def writing(kind: str, output: Path) -> Iterator[Any]:
    """A process in the middle of writing an output."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES.format(kind=kind), str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"there\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def scratches(folder: Path) -> list[Path]:
    found = list(folder.glob(".out-*"))
    for path in found:
        os.utime(path, (0, 0))
    return found


@pytest.mark.parametrize(("kind", "context"), [("staged", staged), ("staged_file", staged_file)])
def test_what_a_kill_left_goes_and_what_is_being_written_stays(
    kind: str, context: Callable[..., Any], tmp_path: Path
) -> None:
    with writing(kind, tmp_path / "out") as process:
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
