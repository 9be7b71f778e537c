"""The lengths of a user's own examples, as training would read them, or of examples that are assumed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimtune.data.labelled import labels_of, tokenize
from slimtune.data.lengths import Lengths, sorted_lengths
from slimtune.data.mixing import mixed, prepare
from slimtune.data.reading import read_parts
from slimtune.data.settings import DataSettings
from slimtune.errors import ConfigError, check_whole
from slimtune.template import use_template

ASSUMED_EXAMPLES = 1000
"""Where none can be counted."""


def measure(data: str | Path | DataSettings, tokenizer: Any, task: str = "auto") -> Lengths:
    """The lengths of examples as `slimtune train` would read and encode them; raises DataError, ConfigError.

    Packed rows and examples that are streamed are taken to be as long as they may be.
    """
    settings = data if isinstance(data, DataSettings) else DataSettings(data)
    if settings.streaming:
        return uniform(settings.max_length, ASSUMED_EXAMPLES)
    if settings.chat_template is not None:
        use_template(tokenizer, settings.chat_template)
    whole = replace(settings, max_length=sys.maxsize, too_long="error")
    parts = read_parts(whole, task)
    if parts.task == "classification":
        rows = [row for part in parts.train for row in part.rows]
        encoded = tokenize([row.texts for row in rows], tokenizer, sys.maxsize)
        return sorted_lengths([len(row["input_ids"]) for row in encoded.rows], len(rows), labels_of(rows))
    if parts.task != "text":
        raise ConfigError(f"rows for task {parts.task} can't be measured before the training; give --max-length")
    examples = mixed(parts.train, prepare(parts.train, whole, tokenizer), seed=0)
    lengths = sorted_lengths([len(e.input_ids) for e in examples], sum(e.learned for e in examples))
    if not settings.packing:
        return lengths
    return uniform(settings.max_length, lengths.packed_rows(settings.max_length))


def uniform(length: int, examples: int) -> Lengths:
    """Examples that are all of one length, where no data was given; all of it is learned."""
    check_whole("length", length, 2)
    check_whole("examples", examples)
    return Lengths((length,) * examples, length * examples)
