"""Damaged forms of a file, the same for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

VALUES = (None, True, -1, 10**30, 0.5, "x", "", [], ["a"], [[1]], {}, {"a": [None]})
"""One for each field in turn, in place of what is there."""


def damaged(whole: bytes, seed: int = 0) -> dict[str, bytes | None]:
    """Damaged forms of a file by name; None for a file that is missing."""
    forms: dict[str, bytes | None] = {
        "missing": None,
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "no text": b"\xff\xfe\x00" + whole,
        "deep": b"[" * 100_000,
        "a number": b"7",
        "a list": b"[]",
        "null": b"null",
        "an empty mapping": b"{}",
    }
    draw = random.Random(seed)
    for number in range(8):
        flipped = bytearray(whole)
        for _ in range(draw.randint(1, 8) if whole else 0):
            flipped[draw.randrange(min(len(whole), 400))] = draw.randrange(256)
        forms[f"seed {seed}, flipped {number}"] = bytes(flipped)
    return forms


def put(path: Path, data: bytes | None) -> None:
    path.unlink(missing_ok=True)
    if data is not None:
        path.write_bytes(data)


def changed_fields(path: Path) -> Iterator[str]:
    """A JSON file with each field missing, then of each other type."""
    whole = path.read_text()
    fields = json.loads(whole)
    for name in fields:
        path.write_text(json.dumps({key: value for key, value in fields.items() if key != name}))
        yield f"without {name}"
        for value in VALUES:
            path.write_text(json.dumps(fields | {name: value}))
            yield f"{name} = {value!r}"
    path.write_text(whole)
