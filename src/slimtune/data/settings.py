"""The data section of a recipe: which sources, what is held out, how rows become examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from slimtune.errors import ConfigError, check_choice, check_number, check_whole, did_you_mean, listing

TOO_LONG = ("error", "drop", "truncate", "split")
BAD_ROWS = ("error", "skip")


@dataclass(frozen=True)
class Source:
    """One place that rows come from; raises ConfigError.

    Attributes:
        path: a file, a folder or the id of a data set on the Hub.
        format: a name of `slimtune.data.formats`, or auto: found by looking at the first rows.
        weight: the share of an epoch that is drawn from here; all sources have one, or none has.
        split: of a folder or a data set; train by default.
        subset: the configuration of a data set on the Hub.
        revision: of a data set on the Hub: a branch, a tag or a commit; main by default.
        fields: names of the format's columns, and what they are called here.
    """

    path: str
    format: str = "auto"
    weight: float | None = None
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The dataclass is frozen; this is its own way in, before anybody has seen it.
        object.__setattr__(self, "path", str(self.path))
        # Path("") is ".", the working directory, which nobody means as a data set.
        if not self.path or self.path == ".":
            raise ConfigError("a data source needs a path: a file, a folder or the id of a data set on the Hub")
        if self.weight is not None:
            check_number(f"the weight of {self.path}", self.weight, 0)
            # 0 of an epoch, and rows that are read, checked and never learned.
            if not self.weight:
                raise ConfigError(f"the weight of {self.path} is 0; give it more, or leave the source out")
        _check_fields(f"fields of {self.path}", self.fields)

    @classmethod
    def of(cls, value: Any) -> Source:
        """A source from its path, or from a mapping of its fields; raises ConfigError for what is neither."""
        if isinstance(value, Source):
            return value
        if isinstance(value, str | Path):
            return cls(str(value))
        if not isinstance(value, Mapping):
            raise ConfigError(f"a data source is a path or a mapping with a path, found {value!r}")
        known = {item.name for item in fields(cls)}
        for name in value:
            if name not in known:
                advice = did_you_mean(str(name), known) or f"; it has {listing(known)}"
                raise ConfigError(f"a data source has no field '{name}'{advice}")
        if "path" not in value:
            raise ConfigError(f"the data source {dict(value)!r} has no path; add the file, folder or id to read")
        return cls(**value)


@dataclass(frozen=True)
class DataSettings:
    """What is learned from; raises ConfigError for values that can't be.

    Attributes:
        train: one source or several, each a path, a mapping or a `Source`; kept as a tuple of sources.
        held_out: a share of the rows of each source, or sources of their own.
        format: of every source that names none of its own.
        fields: of every source that names none of its own: names of the format's columns, and what they are called.
        bad_rows: what becomes of rows that can't be read: error, or skip, with a count and the first of them shown.
        max_length: of an example, in tokens.
        too_long: what becomes of longer ones: error, drop, truncate, or for plain texts split.
        packing: several examples in one row of max_length, none of which sees another.
        streaming: rows are read and encoded while the model learns, for data larger than memory.
        chat_template: a name of `chat_template.named_templates` or a file, in place of the tokenizer's own.
    """

    train: Any
    held_out: Any = 0.0
    format: str = "auto"
    max_length: int = 1024
    too_long: str = "error"
    packing: bool = False
    streaming: bool = False
    chat_template: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    bad_rows: str = "error"

    def __post_init__(self) -> None:
        _check_fields("fields", self.fields)
        object.__setattr__(self, "train", _sources(self.train, self.fields))
        # `bool` so that True is refused by check_number; it would be a share of 1 otherwise.
        if isinstance(self.held_out, bool | int | float):
            check_number("held_out as a share", self.held_out, 0, 1)
        else:
            object.__setattr__(
                self, "held_out", _sources(self.held_out, self.fields) if self.held_out is not None else 0.0
            )
        check_whole("max_length", self.max_length, 2)
        check_choice("too_long", self.too_long, TOO_LONG)
        check_choice("bad_rows", self.bad_rows, BAD_ROWS)
        for name in ("packing", "streaming"):
            check_choice(name, getattr(self, name), (True, False))
        weighted = [source.weight is not None for source in self.train]
        # No number says how much "all rows" is beside a weight.
        if any(weighted) and not all(weighted):
            raise ConfigError("some data sources have a weight and some have none; give all of them one, or none")

    @property
    def held_out_share(self) -> float:
        """The share of the rows that is held out, 0 if there are sources of their own for it."""
        return self.held_out if isinstance(self.held_out, int | float) else 0.0

    @property
    def held_out_sources(self) -> tuple[Source, ...]:
        """The sources of what is held out, none if it is a share."""
        return self.held_out if isinstance(self.held_out, tuple) else ()


def _sources(value: Any, fields: Mapping[str, str]) -> tuple[Source, ...]:
    several = isinstance(value, Sequence) and not isinstance(value, str)
    sources = tuple(Source.of(item) for item in (value if several else [value]))
    if not sources:
        raise ConfigError("no data source was given; name a file, a folder or a data set on the Hub")
    return tuple(source if source.fields else replace(source, fields=fields) for source in sources)


def _check_fields(name: str, fields: Any) -> None:
    if not isinstance(fields, Mapping) or not all(isinstance(column, str) for column in fields.values()):
        raise ConfigError(f"{name} must map names to columns, found {fields!r}")
