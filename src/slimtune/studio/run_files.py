"""Files of the runs for a browser: those under the folder alone, as downloads, as one archive, and as reports."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

from fastapi.responses import FileResponse, Response, StreamingResponse

from slimtune.studio.history import NoSuchRunError, run_path

REPORT_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self'"
)
"""Of a report inside a page: it has its own style, and can neither run, load nor send anything."""
_CHUNK = 1 << 20


def file_path(runs: Path, name: str, inner: str) -> Path:
    """A file of a run. Raises: NoSuchRunError, for what isn't there, leads out of the run's folder, or is no file."""
    folder, missing = run_path(runs, name).resolve(), NoSuchRunError(f"there is no file {inner[:200]!r} in {name}")
    try:
        path = (folder / inner).resolve()
        # A link that stays inside is refused with those that don't: nothing here writes one.
        if not path.is_relative_to(folder) or path != folder / Path(inner) or not path.is_file():
            raise missing
    except (OSError, ValueError, RuntimeError) as error:
        raise missing from error
    return path


def files_of(folder: Path) -> list[Path]:
    """All files of a run, by their place within it; links are left out."""
    paths = (path for path in folder.rglob("*") if not path.is_symlink() and path.is_file())
    return sorted(path.relative_to(folder) for path in paths if path.resolve().is_relative_to(folder.resolve()))


def download(path: Path) -> Response:
    """A file as a download, streamed from disk; never shown, whatever is in it."""
    return FileResponse(path, filename=path.name, media_type="application/octet-stream")


def archive(folder: Path) -> Response:
    """A run as a ZIP that is written while it is sent. Raises: NoSuchRunError, where there is nothing."""
    files = files_of(folder)
    if not files:
        raise NoSuchRunError(f"there are no files in {folder.name}")
    headers = {"content-disposition": _attachment(f"{folder.name}.zip")}
    return StreamingResponse(_zipped(folder, files), media_type="application/zip", headers=headers)


def report(path: Path) -> Response:
    """A report to show in a sandboxed frame."""
    response = FileResponse(path, media_type="text/html; charset=utf-8")
    response.headers["content-security-policy"] = REPORT_POLICY
    return response


def _attachment(name: str) -> str:
    from urllib.parse import quote

    return f"attachment; filename*=UTF-8''{quote(name, safe='')}"


class _Outbox:
    """Takes what `zipfile` writes, and gives it on. It can't be sought in: sizes come behind files."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        """Take a part."""
        self.parts.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def take(self) -> bytes:
        """All that was written since the last time."""
        taken, self.parts = b"".join(self.parts), []
        return taken


def _zipped(folder: Path, files: list[Path]) -> Iterator[bytes]:
    # Stored and not deflated: weights don't get smaller by it, and a core would be busy for minutes.
    outbox = _Outbox()
    with zipfile.ZipFile(outbox, "w", zipfile.ZIP_STORED) as packed:  # type: ignore[arg-type]
        for name in files:
            entry = zipfile.ZipInfo.from_file(
                folder / name, f"{folder.name}/{name.as_posix()}", strict_timestamps=False
            )
            with (folder / name).open("rb") as source, packed.open(entry, "w", force_zip64=True) as target:
                while chunk := source.read(_CHUNK):
                    target.write(chunk)
                    yield outbox.take()
            yield outbox.take()
    yield outbox.take()
