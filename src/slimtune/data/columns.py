"""Columns by the names that people give them: which format a row has, and which of its columns is which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slimtune.data.formats import TURNS, Format, Value, formats_of
from slimtune.errors import DataError, did_you_mean, listing

FIELD_ADVICE = (
    "rename the columns, or say which is which, as in --field prompt=COLUMN or, in a recipe, data.fields.prompt=COLUMN"
)

QUESTIONS = ("question", "query", "problem", "input")
ANSWERS = ("answer", "response", "output", "solution")
TEXTS = ("sentence", "review", "comment", "tweet")
LABELS = ("sentiment", "emotion", "intent", "category", "class")
PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence"))

OTHER_NAMES: Mapping[str, Sequence[Mapping[str, Sequence[str]]]] = {
    "preference": ({"chosen": ("accepted", "preferred")},),
    "unpaired-preference": ({"prompt": QUESTIONS, "completion": ANSWERS},),
    "messages": ({"messages": ("chat", "turns")},),
    "sharegpt": ({"conversations": ("conversation", "dialogue", "dialog")},),
    "alpaca": ({"output": ANSWERS, "input": ("context",)}, {"output": ANSWERS}),
    "prompt-completion": (
        {"prompt": QUESTIONS, "completion": ANSWERS},
        # Pairs by themselves: a source beside a question is where it comes from, a user beside it who asked.
        {"prompt": ("user",), "completion": ("assistant",)},
        {"prompt": ("source",), "completion": ("target",)},
    ),
    "text-label": (*({"text": (a,), "text_pair": (b,)} for a, b in PAIRS), {"text": TEXTS, "label": LABELS}),
    "tokens-tags": ({"tokens": ("words",), "tags": ("ner_tags", "pos_tags", "labels")},),
    "prompt-only": ({"prompt": (*QUESTIONS, "instruction")},),
}
"""Other names of each format's columns. The ways of a format are tried in order; all columns of a way must be there."""


@dataclass(frozen=True)
class Layout:
    """How the rows of a source are read.

    Attributes:
        fields: names of the format's columns, and what they are called in the source.
    """

    format: Format
    fields: Mapping[str, str] = field(default_factory=dict)


def recognize(value: Value, where: str, task: str = "auto") -> Layout:
    """The layout of a row, among those of a task; raises DataError if it has none."""
    renamed: Layout | None = None
    for known in formats_of(task):
        fields = other_names(value, known)
        if not fields:
            _refuse_misspelt(known, value, where)
        if known.fits(value):
            # A text beside a sentiment is to be classified, though a text alone would do for another task.
            is_labelled = renamed is not None and renamed.format.name == "text-label" and "text" in value
            return renamed if renamed and is_labelled and known.name == "text" else Layout(known)
        if renamed is None and fields:
            renamed = Layout(known, fields)
    if renamed is not None:
        return renamed
    raise DataError(f"{where} {_no_format(value, task)}")


def other_names(value: Value, known: Format, optional: Sequence[str] = ()) -> dict[str, str]:
    """The columns of a format that a row has under other names; empty unless it then fits, but for `optional` ones."""
    if known.fits(value):
        return {}
    for way in OTHER_NAMES.get(known.name, ()):
        for columns in known.columns:
            fields: dict[str, str] = {}
            for column in dict.fromkeys((*columns, *way)):
                if column in value:
                    continue
                names = [name for name in way.get(column, ()) if _can_be(column, value.get(name))]
                if names or column not in optional:
                    # With two columns that could be meant, taking either would be a guess.
                    fields[column] = names[0] if len(names) == 1 else ""
            # No column may stand for two.
            if fields and all(fields.values()) and len(set(fields.values())) == len(fields):
                return fields
    return {}


def _can_be(column: str, content: Any) -> bool:
    """Whether a value could stand in a column, by its type."""
    if column in TURNS:
        return isinstance(content, list) or (isinstance(content, str) and content.lstrip().startswith("["))
    if column in ("tokens", "tags"):
        return isinstance(content, list)
    return isinstance(content, str | int if column == "label" else str | list)


def _refuse_misspelt(known: Format, value: Value, where: str) -> None:
    """Raises: DataError, if a row has all columns but one that is misspelt: a simpler format must not take it."""
    columns = known.columns[0]
    missing = set(columns) - value.keys()
    if len(missing) == 1 < len(columns):
        for key in value.keys() - set(columns):
            if near := did_you_mean(key, missing):
                fields = listing(value)
                raise DataError(f"{where} has the fields {fields}; format {known.name} needs {known.needs}{near}")


def _no_format(value: Value, task: str) -> str:
    """What a row without a format has, what it could have, and what to do."""
    if not value:
        return "has no fields; correct the row"
    formats = formats_of(task)
    names = {column for known in formats for columns in known.columns for column in columns}
    near = next(filter(None, (did_you_mean(key, names) for key in value if key not in names)), "")
    needed = "; ".join(f"{known.name} needs {known.needs}" for known in formats)
    advice = near or f"; {FIELD_ADVICE}"
    return f"has the fields {listing(value)}, which is no format of task {task} ({needed}){advice}"
