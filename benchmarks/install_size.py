"""What the library and each of its extras take, to download and on disk: `python -m benchmarks.install_size`.

To download are the files that `pip download` would fetch for this machine, which pip's resolver names; their sizes are
asked for where they lie. On disk are the files of the installed packages; what isn't installed is named.
"""

from __future__ import annotations

import importlib.metadata as metadata
import json
import platform
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

ROOT = Path(__file__).parents[1]
LEFT_OUT = ("dev", "docs", "reasoning", "all")
"""Extras that a user doesn't need, and their sum."""


def main() -> None:
    """Print the table of extras in Markdown."""
    sizes = downloads("all")
    base = required([("slimtune", "")])
    installed = {name for name in base if _is_installed(name)}
    print(f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {date.today()}\n")
    print("| extra | to download | on disk |\n|---|---|---|")
    print(f"| none, with torch {metadata.version('torch')} | {_sum(base, sizes)} | {_megabytes(installed)} |")
    for extra in metadata.metadata("slimtune").get_all("Provides-Extra") or []:
        if extra in LEFT_OUT:
            continue
        more = required([("slimtune", extra)]) - base
        missing = sorted(name for name in more if not _is_installed(name))
        note = f", without {', '.join(missing)}" if missing else ""
        print(f"| `{extra}` | {_sum(more, sizes)} | {_megabytes(more - set(missing))}{note} |")


def downloads(extra: str) -> dict[str, int]:
    """The bytes of each package that pip would fetch for an extra, as it is pinned here."""
    command = [
        sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-",
        "--constraint", str(ROOT / "constraints.txt"), f"{ROOT}[{extra}]",
    ]  # fmt: skip
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {_normal(item["metadata"]["name"]): _size(item["download_info"]) for item in report["install"]}


def _size(where: Mapping[str, Any]) -> int:
    """The size of a file by its address; none for the library's own folder."""
    url = where["url"]
    if urlsplit(url).scheme == "file":
        path = Path(url2pathname(urlsplit(url).path))
        return path.stat().st_size if path.is_file() else 0
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
        return int(answer.headers["Content-Length"])


def required(wanted: Iterable[tuple[str, str]]) -> set[str]:
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


def _sum(names: Iterable[str], sizes: Mapping[str, int]) -> str:
    unknown = sorted(set(names) - sizes.keys())
    note = f", without {', '.join(unknown)}" if unknown else ""
    return f"{sum(sizes.get(name, 0) for name in names) / 1e6:,.0f} MB{note}"


def _megabytes(names: Iterable[str]) -> str:
    files = [file for name in names for file in metadata.files(name) or []]
    size = sum(file.size or 0 for file in files)
    return f"{size / 1e6:,.0f} MB"


if __name__ == "__main__":
    main()
