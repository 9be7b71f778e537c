"""An output folder that is there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimtune.errors import ConfigError, OutputExistsError

_NAME_BYTES = 255
"""Of a file's name, on nearly every file system."""
_SCRATCH_ENDING = ".-xxxxxxxx"
"""What the name of a scratch folder has more than that of the output."""


def refuse_existing(output: Path, overwrite: bool = False) -> None:
    """Check that a folder may be written.

    Raises:
        OutputExistsError: it holds something already that may not be replaced, or is a file.
        ConfigError: its name is too long for the folders that are made beside it on the way.
    """
    longest = _NAME_BYTES - len(_SCRATCH_ENDING)
    if (length := len(os.fsencode(output.name))) > longest:
        raise ConfigError(
            f"the name of the output folder '{output.name[:40]}...' has {length} bytes; choose one of at most {longest}"
        )
    if output.is_dir():
        entries = [entry.name for entry in output.iterdir()]
        if entries and not overwrite:
            raise OutputExistsError(
                f"the output folder {output} already holds {len(entries)} files (such as {min(entries)}); "
                f"choose another one, or pass --overwrite to replace files of the same name once the new ones are whole"
            )
    elif output.exists():
        raise OutputExistsError(f"the output {output} is a file, not a folder; choose another name")


@contextmanager
def staged(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A scratch folder beside `output` that takes its place once the block ends well; raises OutputExistsError."""
    refuse_existing(output, overwrite)
    # Against its full path, for the working directory may change while the work is done.
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        yield scratch
        scratch.chmod(0o777 & ~_umask())
        _replace(scratch, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def staged_file(output: Path) -> Iterator[Path]:
    """A scratch file beside `output` that takes its place once the block ends well."""
    output.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}-")
    os.close(descriptor)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, output)
    finally:
        Path(name).unlink(missing_ok=True)


def write_file(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with staged_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _replace(scratch: Path, output: Path) -> None:
    if not output.exists() or not any(output.iterdir()):
        os.replace(scratch, output)
        return
    # File by file: a folder to overwrite may be someone's home, and what is not written anew stays.
    for entry in scratch.iterdir():
        target = output / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(entry, target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk before anything else is done."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
