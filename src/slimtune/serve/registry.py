"""The adapters by name and version: loaded from disk at their first use, put out when room is needed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import re
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slimtune.engine.request import LoadedAdapter
from slimtune.errors import AdapterFileError, ConfigError, SlimtuneError, listing
from slimtune.models.headers import read_folder
from slimtune.serve.backend import Backend
from slimtune.serve.openai import not_found, unavailable
from slimtune.serve.tenants import BASE
from slimtune.storage.foreign import reading_files
from slimtune.storage.source import ADAPTER

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What an adapter may be called; `@` parts the name from its version."""

State = Literal["disk", "loading", "loaded", "broken"]


@dataclass(eq=False)
class Adapter:
    """One version of an adapter.

    Attributes:
        stored_bytes: of its file, which is what it will take about.
        users: requests that run on it; it stays loaded for as long.
        used: when it was used last.
        error: why it can't be loaded.
        digest: of its files when it was loaded first: a version never stands for others.
    """

    name: str
    version: int
    folder: Path
    method: str
    rank: int | None
    stored_bytes: int
    created: float
    users: int = 0
    used: float = 0.0
    loaded: LoadedAdapter | None = None
    error: str | None = None
    removed: bool = False
    digest: str | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def versioned(self) -> str:
        """`name@version`, as the backend knows it. None is given twice, so no cache is taken for another's."""
        return f"{self.name}@{self.version}"

    @property
    def state(self) -> State:
        """Where it is."""
        if self.loaded:
            return "loaded"
        return "loading" if self.lock.locked() else "broken" if self.error else "disk"

    @property
    def bytes(self) -> int:
        """The memory that it takes where it is loaded."""
        return self.loaded.bytes if self.loaded else 0


class Registry:
    """All adapters, and which of them the backend holds.

    Args:
        memory: the bytes that loaded adapters may take together; None leaves that to the backend.
        reserved: what no adapter may be called, the name of the base.
        patience: seconds to wait for one that is in use to make room.
    """

    def __init__(
        self, backend: Backend, memory: int | None = None, reserved: str = BASE, patience: float = 60.0
    ) -> None:
        self.backend, self.memory, self.patience = backend, memory, patience
        self.reserved = {BASE, reserved}
        self._versions: dict[str, dict[int, Adapter]] = {}
        self._next: dict[str, Iterator[int]] = {}
        self._room = asyncio.Lock()
        self._freed = asyncio.Event()
        self.evictions = 0

    def __iter__(self) -> Iterator[Adapter]:
        return iter([adapter for versions in self._versions.values() for adapter in versions.values()])

    def register(self, name: str, folder: Path, is_folder: bool = True) -> Adapter:
        """Enrol the adapter in a folder as the newest version of its name.

        Args:
            is_folder: False where the folder is the name of a model on another server.

        Raises:
            AdapterFileError, ConfigError: it can't be read; or its name is none.
        """
        adapter = self.draft(name, folder, is_folder)
        self.enrol(adapter)
        return adapter

    def draft(self, name: str, folder: Path, is_folder: bool = True) -> Adapter:
        """A new version of a name that no request can name yet. Raises: as `register`."""
        if not self._can_name(name):
            raise ConfigError(
                f"an adapter can't be called '{name[:140]}'; take letters, digits, '.', '_' and '-', and not the name "
                "of the base"
            )
        config: Mapping[str, Any] = {"peft_type": "remote"}
        stored_bytes = 0
        if is_folder:
            stored = read_folder(folder, ADAPTER, "adapter_model*.safetensors")
            config, stored_bytes = stored.config, stored.stored_bytes
        rank = config.get("r")
        rank = rank if isinstance(rank, int) else None
        return self._new(name, folder, str(config.get("peft_type", "unknown")), rank, stored_bytes)

    def enrol(self, adapter: Adapter) -> None:
        """Let requests name a version; where it is the newest, its name means it from now on."""
        self._versions.setdefault(adapter.name, {})[adapter.version] = adapter

    def enrol_broken(self, name: str, folder: Path, error: str) -> None:
        """List an adapter that can't be read, with the reason; a request for it tries once more to load it."""
        if self._can_name(name):
            adapter = self._new(name, folder, "unknown", None, 0)
            adapter.error = error
            self.enrol(adapter)

    def _can_name(self, name: str) -> bool:
        return NAME.fullmatch(name) is not None and name not in self.reserved

    def _new(self, name: str, folder: Path, method: str, rank: int | None, stored_bytes: int) -> Adapter:
        # Counted on where all versions are gone again.
        version = next(self._next.setdefault(name, itertools.count(1)))
        return Adapter(name, version, folder, method, rank, stored_bytes, time.time())

    def find(self, model: str) -> Adapter | None:
        """The adapter that `name` (its newest version) or `name@version` means."""
        name, at, version = model.partition("@")
        versions = self._versions.get(name)
        if not versions:
            return None
        if at:
            return versions.get(int(version)) if re.fullmatch(r"[0-9]{1,9}", version) else None
        return versions[max(versions)]

    @asynccontextmanager
    async def use(self, adapter: Adapter) -> AsyncIterator[str]:
        """Hold an adapter loaded; what the backend calls it. Raises: AdapterFileError, ApiError."""
        if adapter.removed:
            raise not_found(adapter.versioned, ())
        # Before the first await: an eviction in between would take it for idle.
        adapter.users += 1
        adapter.idle.clear()
        try:
            await self._load(adapter)
            yield adapter.versioned
        finally:
            adapter.users -= 1
            adapter.used = time.monotonic()
            if not adapter.users:
                adapter.idle.set()
                self._freed.set()

    async def unload(self, adapter: Adapter) -> None:
        """Take a version out of the list at once, and its memory back once no request runs on it."""
        adapter.removed = True
        versions = self._versions.get(adapter.name, {})
        versions.pop(adapter.version, None)
        if not versions:
            self._versions.pop(adapter.name, None)
        await adapter.idle.wait()
        await self._put_out(adapter)

    async def _load(self, adapter: Adapter) -> None:
        # A hundred requests for a cold adapter load it once; all but the first wait here.
        async with adapter.lock:
            if adapter.loaded:
                return
            # One load at a time: two that each see room for one would overfill the memory together.
            async with self._room:
                await self._make_room(adapter.stored_bytes)
                try:
                    await _to_the_end(self._put_in(adapter))
                except SlimtuneError as error:
                    adapter.error = str(error)
                    raise
            adapter.error = None

    async def _put_in(self, adapter: Adapter) -> None:
        # What never leaves the memory is read once.
        digest = "" if self.memory is None else await asyncio.to_thread(digest_of, adapter.folder)
        if adapter.digest not in (None, digest):
            raise AdapterFileError(
                f"the files of '{adapter.versioned}' were changed after it was loaded; load them as a new version"
            )
        adapter.loaded = await self.backend.load_adapter(adapter.versioned, adapter.folder)
        adapter.digest = digest

    async def _make_room(self, needed: int) -> None:
        if self.memory is None:
            return
        if needed > self.memory:
            raise AdapterFileError(
                f"the adapter has {needed:,} bytes, and all of them together may take {self.memory:,}; raise "
                "--adapter-memory"
            )
        try:
            async with asyncio.timeout(self.patience):
                while sum(other.bytes for other in self) + needed > self.memory:
                    self._freed.clear()
                    if not await self._evict():
                        # All are in use: the first one whose requests have ended makes room.
                        await self._freed.wait()
        except TimeoutError:
            raise unavailable("all adapters in memory are in use; try again later", code="no_room") from None

    async def _evict(self) -> bool:
        """Put out the one that was idle for the longest; False where there is none."""
        idle = [other for other in self if other.loaded and not other.users]
        if not idle:
            return False
        await self._put_out(min(idle, key=lambda other: other.used))
        self.evictions += 1
        return True

    async def _put_out(self, adapter: Adapter) -> None:
        if adapter.loaded:
            # Before the call, so that whoever wants it now waits for room and loads it again.
            adapter.loaded = None
            await _to_the_end(self.backend.unload_adapter(adapter.versioned))


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await work that goes on in the backend though its client has gone; what it changes is known when this returns."""
    task = asyncio.ensure_future(work)
    try:
        # The engine can't be interrupted halfway; a cancelled client leaves the work to come to its end.
        await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        raise


@reading_files()
def digest_of(folder: Path) -> str:
    """What an adapter's files hold, in short. Raises: AdapterFileError, where they can't be read."""
    digest = hashlib.sha256()
    # Config and weights: the same matrices under another alpha are another adapter.
    for file in sorted(folder.glob("adapter_*")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def folders_of(root: Path) -> dict[str, Path]:
    """The adapters in a folder of folders, by name. Raises: AdapterFileError."""
    if not root.is_dir():
        raise AdapterFileError(f"no folder {root}; pass one that holds the folders of adapters")
    return {path.parent.name: path.parent for path in sorted(root.glob(f"*/{ADAPTER}"))}


def inside(root: Path | None, path: str) -> Path:
    """A path that a client names, which has to lie under `root`. Raises: ConfigError."""
    if root is None:
        raise ConfigError("the server was started without --adapters DIR, so no adapter can be loaded while it runs")
    try:
        resolved = (root / path).resolve()
        is_adapter = (resolved / ADAPTER).is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"'{path[:100]}' is no path") from error
    # After links and `..` are resolved; the root itself is no adapter.
    if root.resolve() not in resolved.parents:
        raise ConfigError(f"'{path[:100]}' does not lie under the server's folder of adapters")
    if not is_adapter:
        names = listing(folders_of(root)) or "none"
        raise ConfigError(f"no adapter in '{path[:100]}'; the folder of adapters holds: {names}")
    return resolved
