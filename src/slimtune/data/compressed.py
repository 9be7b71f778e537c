"""Files compressed by gzip, read as what they hold, and no more of it than such a file can hold in earnest."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import Any

from slimtune.errors import DataError

PACKED = ".gz"
MOST_TIMES = 100
"""How many times its own size a packed file may have unpacked. Text packs to a fifth, a bomb to a thousandth."""
ANY_BYTES = 256_000_000
"""Unpacked, this much is read of any file."""


def kind_of(path: Path) -> str:
    """The suffix that tells how a file is read, in small letters and without that of the packing."""
    return (path.with_suffix("") if is_packed(path) else path).suffix.lower()


def is_packed(path: Path) -> bool:
    """Whether gzip packed the file, by its name."""
    return path.suffix.lower() == PACKED


def opened(path: Path) -> Any:
    """The bytes of a file, unpacked where it is packed; raises OSError, and DataError while a packed one is read."""
    return io.BufferedReader(_Unpacked(path), 2**20) if is_packed(path) else path.open("rb")


class _Unpacked(io.RawIOBase):
    """Raises: DataError, where the file is damaged, or unpacks to more than its size allows."""

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.seen = path, gzip.open(path, "rb"), 0  # noqa: SIM115 - closed by `close`
        self.most = max(ANY_BYTES, MOST_TIMES * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.seen = self.file.seek(offset, whence)
        return self.seen

    def readinto(self, buffer: Any) -> int:
        try:
            found = self.file.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self.path} can't be unpacked ({error}); fetch it again, or pack it with gzip") from error
        self.seen += len(found)
        if self.seen > self.most:
            raise DataError(
                f"{self.path} unpacks to more than {self.most / 1e6:,.0f} MB, {MOST_TIMES} times its size or more; "
                "unpack it yourself if you trust it"
            )
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self.file.close()
        super().close()
