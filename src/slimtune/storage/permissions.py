"""Files that whoever the umask lets may read, also those of libraries that make theirs for the owner alone."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_umask_lock = threading.Lock()


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors that are contiguous and share no memory. Raises: OSError, SafetensorError."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    # The library makes its files for the owner alone, and a server is often another user than who trains.
    by_umask(path)


def by_umask(path: str | os.PathLike[str]) -> None:
    """Give a file, or a folder with all that is in it, the permissions of what a plain `open` or `mkdir` makes."""
    mask = _umask()
    for each in (Path(path), *Path(path).rglob("*")):
        if each.is_symlink() or not (each.is_file() or each.is_dir()):
            continue
        plain = (0o777 if each.is_dir() else 0o666) & ~mask
        # The bits above stay: in a folder of a group's, one of them hands the group on.
        each.chmod(stat.S_IMODE(each.stat().st_mode) & ~0o777 | plain)


def _umask() -> int:
    # It can only be read by setting it: of two threads inside, one would read the other's 0 and leave it behind.
    with _umask_lock:
        mask = os.umask(0)
        os.umask(mask)
    return mask
