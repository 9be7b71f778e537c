"""Tokens to calibrate on: the user's own data, or shipped texts that no measurement here is made on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from slimtune.errors import DataError
from slimtune.evaluate.domain_texts import read_texts, texts
from slimtune.evaluate.language_loss import Text, passages

CALIBRATION = ("facts", "arithmetic", "code", "chat", "german")
"""The shipped texts that are calibrated on."""
MEASURED = "prose"
"""The shipped texts that the report is measured on."""
WINDOW = 256
TOKENS = 4096
LEAST = 1024
"""Fewer tokens say too little of a layer's inputs, of which there are more than that."""
_ROWS = 4
"""Windows in a batch."""


def calibration_batches(tokenizer: Any, path: Path | None = None, tokens: int = TOKENS) -> list[dict[str, Any]]:
    """Batches of {"input_ids": (rows, tokens)} without padding.

    Args:
        path: rows of any format that `slimtune train` reads, or a text file; without it, shipped texts.
        tokens: at most so many.

    Raises:
        DataError: the file can't be read, or has too few tokens.
    """
    if path is None:
        domains = texts(CALIBRATION)
        # One of each domain in turn, so that a few tokens have something of all of them.
        longest = max(map(len, domains.values()))
        mixed: list[Text] = [rows[i] for i in range(longest) for rows in domains.values() if i < len(rows)]
        return _windows(mixed, tokenizer, "the shipped texts", tokens)
    return _windows(read_texts(path), tokenizer, str(path), tokens)


def measured_ids(tokenizer: Any, tokens: int = 4096) -> torch.Tensor:
    """Windows (rows, tokens) of the shipped prose, which nothing is calibrated on."""
    batches = _windows(texts([MEASURED])[MEASURED], tokenizer, MEASURED, tokens)
    return torch.cat([batch["input_ids"] for batch in batches])


def _windows(read: Sequence[Text], tokenizer: Any, where: str, tokens: int) -> list[dict[str, Any]]:
    ids: list[int] = []
    for passage in passages(where, read, tokenizer, max_length=1 << 20):
        ids += passage.encoded.input_ids
        if len(ids) >= tokens:
            break
    if len(ids) < LEAST:
        raise DataError(
            f"{where} has {len(ids):,} tokens, and calibration takes at least {LEAST:,}; pass more data, or method rtn"
        )
    count = min(len(ids), tokens) // WINDOW
    windows = torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)
    return [{"input_ids": rows} for rows in windows.split(_ROWS)]
