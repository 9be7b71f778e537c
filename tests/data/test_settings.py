"""The data section of a recipe: what it takes, and what it refuses by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slimtune.data.settings import DataSettings, Source
from slimtune.errors import ConfigError


def test_one_source_and_several_in_every_notation() -> None:
    one = DataSettings(Path("a.jsonl"))
    assert one.train == (Source("a.jsonl"),)
    several = DataSettings(["a.jsonl", {"path": "org/set", "split": "test", "fields": {"prompt": "q"}}])
    assert several.train == (Source("a.jsonl"), Source("org/set", split="test", fields={"prompt": "q"}))
    assert DataSettings(several.train) == several


def test_held_out_is_a_share_or_sources() -> None:
    share = DataSettings("a.jsonl", 0.25)
    assert (share.held_out_share, share.held_out_sources) == (0.25, ())
    sources = DataSettings("a.jsonl", "b.jsonl")
    assert (sources.held_out_share, sources.held_out_sources) == (0.0, (Source("b.jsonl"),))
    assert DataSettings("a.jsonl", None).held_out_share == 0.0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train": []}, "no data source"),
        ({"train": ""}, "needs a path"),
        ({"train": 3}, "found 3"),
        ({"train": {"split": "test"}}, "has no path"),
        ({"train": {"path": "a", "wieght": 2}}, "did you mean 'weight'"),
        ({"train": {"path": "a", "weight": 0}}, "is 0"),
        ({"train": {"path": "a", "weight": -1}}, "found -1"),
        ({"train": {"path": "a", "fields": ["q"]}}, "must map names to columns"),
        ({"train": [{"path": "a", "weight": 1}, "b"]}, "some have none"),
        ({"train": "a", "held_out": 1.0}, r"\[0, 1\), found 1.0"),
        ({"train": "a", "held_out": True}, "found True"),
        ({"train": "a", "max_length": 1}, "at least 2, found 1"),
        ({"train": "a", "too_long": "cut"}, "error, drop, truncate"),
        ({"train": "a", "packing": "yes"}, "packing must be one of True, False"),
        ({"train": "a", "streaming": 1}, "streaming must be"),
    ],
)
def test_what_can_not_be(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DataSettings(**values)
