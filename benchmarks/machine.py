"""What the figures were measured on: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("slimtune", "peft", "torch", "transformers")
BUSY_SHARE = 0.3
"""With more of its cores than this at work for others, a machine's timings say little."""


def cpu_model() -> str:
    """The name the processor gives itself."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"model name\s*:\s*(.+)", information.read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gb() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The commit that is checked out, marked when the library's source differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("-changed" if git("status", "--porcelain", "src") else "")


def describe(torch_settings: dict[str, Any]) -> dict[str, Any]:
    """The machine and the versions, with the settings of torch that a measurement reported."""
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_gb": memory_gb(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in PACKAGES},
        **torch_settings,
    }


def host_kind(machine: dict[str, Any]) -> str:
    """The kind of machine as a part of a file name."""
    name = machine["device"] if machine["device"] != "cpu" else f"{machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load() -> float:
    """How many cores others kept busy over the last minute."""
    return os.getloadavg()[0]


def today() -> str:
    return datetime.now(UTC).date().isoformat()
