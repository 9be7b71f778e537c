"""What the library and each of its extras take on disk: `python -m benchmarks.install_size`.

Sizes are those of the files of the installed packages and of all that they require; what isn't installed is named.
"""

from __future__ import annotations

import importlib.metadata as metadata
import platform
import re
from collections.abc import Iterable
from datetime import date

LEFT_OUT = ("dev", "docs", "reasoning", "all")
"""Extras that a user doesn't need, and their sum."""


def main() -> None:
    """Print the table of extras in Markdown."""
    base = _required([("slimtune", "")])
    installed = {name for name in base if _is_installed(name)}
    print(f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {date.today()}\n")
    print("| extra | on disk |\n|---|---|")
    print(f"| none, with torch {metadata.version('torch')} | {_megabytes(installed)} |")
    for extra in metadata.metadata("slimtune").get_all("Provides-Extra") or []:
        if extra in LEFT_OUT:
            continue
        more = _required([("slimtune", extra)]) - base
        missing = sorted(name for name in more if not _is_installed(name))
        note = f", without {', '.join(missing)}" if missing else ""
        print(f"| `{extra}` | {_megabytes(more - set(missing))}{note} |")


def _required(wanted: Iterable[tuple[str, str]]) -> set[str]:
    """The names of all packages that these, each with an extra or none, require here, themselves included."""
    from packaging.requirements import Requirement

    seen: set[tuple[str, str]] = set()
    waiting = list(wanted)
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for line in metadata.requires(name) or [] if _is_installed(name) else []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(_normal(requirement.name), more) for more in ("", *requirement.extras)]
    return {name for name, _ in seen} - {"slimtune"}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _megabytes(names: Iterable[str]) -> str:
    files = [file for name in names for file in metadata.files(name) or []]
    size = sum(file.size or 0 for file in files)
    return f"{size / 1e6:,.0f} MB"


if __name__ == "__main__":
    main()
