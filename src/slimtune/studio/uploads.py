"""Files that a browser sends: written to disk as they come, under a name that leads nowhere else."""

from __future__ import annotations

import filecmp
import os
import re
import unicodedata
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from slimtune.errors import ConfigError

DATA = "data"
"""The folder of them within that of the runs."""
_MAX_NAME = 120


def safe_name(name: str) -> str:
    """The last part of a name, of letters, digits, dots, hyphens and underscores. Raises: ConfigError, if none is left.

    >>> safe_name("../../My orders (2).jsonl")
    'My_orders_2_.jsonl'
    """
    last = unicodedata.normalize("NFC", name).replace("\\", "/").rpartition("/")[2]
    # A dot in front would hide it, a hyphen would make it an option.
    safe = re.sub(r"[^\w.-]+", "_", last).lstrip("._-")[-_MAX_NAME:].lstrip("._-")
    if not safe:
        raise ConfigError(f"{name!r} is no name for a file; rename it, for example to orders.jsonl")
    return safe


async def receive(folder: Path, name: str, chunks: AsyncIterator[bytes]) -> Path:
    """Write what comes to a file of a folder, and give its path: that of an equal file which is there already, if any.

    Raises: ConfigError, for a name that is none, or an empty file; what `chunks` raises, and nothing stays of the file.
    """
    name = safe_name(name)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{os.urandom(6).hex()}.part"
    try:
        with scratch.open("xb") as file:
            async for chunk in chunks:
                await run_in_threadpool(file.write, chunk)
        if not scratch.stat().st_size:
            raise ConfigError(f"{name} is empty; choose a file with rows")
        return await run_in_threadpool(_placed, scratch, folder / name)
    finally:
        with suppress(FileNotFoundError):
            scratch.unlink()


def files_in(folder: Path) -> list[Path]:
    """The files that were received, the newest first."""
    if not folder.is_dir():
        return []
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)


def _placed(scratch: Path, path: Path) -> Path:
    """Move a file to a path, numbered where another file has it."""
    stem, dot, suffixes = path.name.partition(".")
    target, number = path, 2
    while True:
        try:
            # Claimed before it is replaced: two uploads of one name may end at once.
            target.open("xb").close()
        except FileExistsError:
            if filecmp.cmp(scratch, target, shallow=False):
                return target
            target, number = path.with_name(f"{stem}-{number}{dot}{suffixes}"), number + 1
            continue
        os.replace(scratch, target)
        return target
