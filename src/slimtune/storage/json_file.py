"""JSON that others wrote: as long and as deep as such files are, and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 2**26
"""Indexes of the largest models have some megabytes."""


def read_json(path: Path) -> Any:
    """The value in a file. Raises: OSError; ValueError, for what is not JSON, too long or nested too deeply."""
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    return parse_json(data)


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text. Raises: ValueError, for what is not JSON or nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
