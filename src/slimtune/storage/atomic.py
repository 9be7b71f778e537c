"""Files and folders that are there as a whole or not at all: written under another name, then renamed.

A process holds a lock on what it writes, so that what a kill left behind is told from what is being written.
"""

from __future__ import annotations

import ctypes
import glob
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from slimtune.errors import ConfigError, OutputExistsError, counted
from slimtune.storage.permissions import by_umask

try:
    import fcntl
except ImportError:
    # On Windows nothing is locked, so nothing that a kill left is removed there.
    fcntl = None

_SUFFIX = ".partial"
_CONFIGS = ("adapter_config.json", "config.json")
"""Without one of these, a folder is no model."""
_SECONDS_TO_LOCK = 2
_LONGER = 24
"""Bytes by which the name of a file or folder beside an output is longer than the output's own, at most."""


def refuse_existing(output: Path, overwrite: bool = False) -> None:
    """Raise OutputExistsError if `output` holds something already and may not be replaced; ConfigError for its name."""
    check_name(output)
    if output.is_dir():
        entries = [entry.name for entry in output.iterdir()]
        if entries and not overwrite:
            raise OutputExistsError(
                f"the output folder {output} already holds {counted(len(entries), 'file')} (such as {min(entries)}); "
                f"choose another one, or pass --overwrite to replace files of the same name once the new ones are whole"
            )
    elif output.exists():
        raise OutputExistsError(f"the output {output} is a file, not a folder; choose another name")


def check_name(output: Path) -> None:
    """Raises: ConfigError, for a name so long that temporary files beside the output could have none."""
    folder = next((parent for parent in output.absolute().parents if _is_folder(parent)), None)
    if folder is None or not hasattr(os, "pathconf"):
        return
    most = os.pathconf(folder, "PC_NAME_MAX") - _LONGER
    names = output.absolute().relative_to(folder).parts
    longest = max((len(os.fsencode(name)) for name in names), default=0)
    if longest > most:
        raise ConfigError(
            f"a name in the output {str(output)[:60]}... has {longest} bytes; choose one of at most {most}"
        )


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        # Its name is too long to be one.
        return False


@contextmanager
def staged(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A scratch folder beside `output` that takes its place once the block ends well; raises OutputExistsError."""
    refuse_existing(output, overwrite)
    # Against its full path, for the working directory may change while the work is done; a link stays one.
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    remove_left_behind(output)
    # Beside the output: a rename works within one file system only.
    scratch = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-", suffix=_SUFFIX))
    try:
        with _held(scratch):
            yield scratch
            # mkdtemp makes it for the owner alone, which a shared folder of models must not be, and so does safetensors
            # its files.
            by_umask(scratch)
            _replace(scratch, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def staged_file(output: Path) -> Iterator[Path]:
    """A scratch file beside `output` that takes its place once the block ends well."""
    output.parent.mkdir(parents=True, exist_ok=True)
    remove_left_behind(output)
    descriptor, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}-", suffix=_SUFFIX)
    os.close(descriptor)
    try:
        with _held(Path(name)):
            yield Path(name)
            by_umask(name)
            # Unlike `rename`, it replaces on Windows as well.
            os.replace(name, output)
    finally:
        Path(name).unlink(missing_ok=True)


def write_file(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with staged_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def remove_left_behind(output: Path) -> None:
    """Remove the scratch files and folders of `output` that no process writes any more, as a kill leaves them."""
    output = output.absolute()
    name = re.compile(rf"\.{re.escape(output.name)}-[a-z0-9_]{{8}}{re.escape(_SUFFIX)}")
    for path in output.parent.glob(f".{glob.escape(output.name)}-*{_SUFFIX}"):
        # Where the lock can't be had, for whatever reason, the scratch stays.
        with suppress(OSError), _lock(path):
            # One that was made this moment may not be locked yet.
            if not name.fullmatch(path.name) or time.time() - path.stat().st_mtime < _SECONDS_TO_LOCK:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def _held(scratch: Path) -> Iterator[None]:
    """Hold the lock of a scratch file or folder while it is written."""
    with ExitStack() as stack:
        # Some network file systems have no such locks: nothing is told apart there, and nothing removed.
        with suppress(OSError):
            stack.enter_context(_lock(scratch))
        yield


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Lock a file or folder; raises OSError where another process holds the lock, or there are none.

    The lock belongs to the open file, so it goes with its process, whatever ends that, also in another container.
    """
    if fcntl is None:
        raise OSError("this system has no such locks")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _replace(scratch: Path, output: Path) -> None:
    """Put the scratch folder in place of the output; what of the output isn't written anew stays."""
    # An empty folder may be replaced by a rename on POSIX; one with files in it may not.
    if not output.exists() or not any(output.iterdir()):
        os.replace(scratch, output)
    elif not _exchange_with_rest(scratch, output):
        _replace_files(scratch, output)


def _exchange_with_rest(scratch: Path, output: Path) -> bool:
    """Exchange the two folders in one step, the rest of the output linked into the new one before.

    False, and nothing is changed, where that can't be: no links or no exchange on this file system, or a process that
    stands in the folder, as a shell does that passes `--output .`.
    """
    if Path.cwd().is_relative_to(output):
        return False
    # What was put in by this function, to be taken out again if the exchange fails: the caller's files stay.
    linked: list[Path] = []
    try:
        for entry in output.iterdir():
            target = scratch / entry.name
            # `lexists`: a dangling link in the new folder is a file of the new one, too.
            if not os.path.lexists(target):
                linked.append(target)
                if entry.is_dir() and not entry.is_symlink():
                    shutil.copytree(entry, target, symlinks=True, copy_function=_link)
                else:
                    _link(entry, target)
        _exchange(scratch, output)
    except (OSError, shutil.Error):
        for target in linked:
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target, ignore_errors=True)
            else:
                target.unlink(missing_ok=True)
        return False
    return True


def _link(source: str | Path, target: str | Path) -> None:
    os.link(source, target, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> None:
    """Exchange two paths in one step, by Linux's or macOS's call; raises OSError where there is none."""
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    paths = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):
        here = -100  # AT_FDCWD
        failed = libc.renameat2(here, paths[0], here, paths[1], 2)  # RENAME_EXCHANGE
    elif hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(*paths, 2)  # RENAME_SWAP
    else:
        raise OSError("this system can't exchange two folders in one step")
    if failed:
        raise OSError(ctypes.get_errno(), "the folders can't be exchanged")


def _replace_files(scratch: Path, output: Path) -> None:
    """File by file, the configs last: a folder that was cut off in the middle has none, and is read by nobody."""
    configs = [entry for entry in scratch.iterdir() if entry.suffix == ".json"]
    for name in {*_CONFIGS, *(entry.name for entry in configs)}:
        if (output / name).is_file() and (name in _CONFIGS or (scratch / name).is_file()):
            (output / name).unlink()
    for entry in sorted(scratch.iterdir(), key=lambda entry: entry in configs):
        target = output / entry.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(entry, target)


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk before anything else is done."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
