"""What must be the same for a run that was broken off to go on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from slimtune.errors import ConfigError, listing

MAY_CHANGE = ("save_steps", "save_minutes", "save_total_limit", "report_to", "dataloader_workers")
"""Settings of training that leave the numbers of a run as they are."""


def refuse_other(
    folder: Path, then: Mapping[str, Any], now: Mapping[str, Any], may_change: Collection[str] = ()
) -> None:
    """Raises: ConfigError, with the keys that differ between the run in `folder` and the one that is to go on."""
    names = sorted(n for n in then.keys() | now.keys() if n not in may_change and then.get(n) != now.get(n))
    if not names:
        return
    shown = [f"{name} was {then.get(name)!r:.60} and is {now.get(name)!r:.60}" for name in names]
    differing = ", ".join(shown) if len(names) <= 4 else listing(names, 4)
    raise ConfigError(
        f"the run in {folder} was begun with another recipe: {differing}; resume with the same, or begin anew with "
        "--overwrite"
    )
