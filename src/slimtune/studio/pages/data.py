"""Data before training: a file is dropped or named, and `slimtune data preview` says what a model would learn of it.

The names of the form's fields are the places of settings (`data.train`, `data.fields.prompt`), and the address takes
the same.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from slimtune.data.chat_template import named_templates
from slimtune.data.formats import FORMATS
from slimtune.data.settings import Source
from slimtune.data.sources import kind_of, records
from slimtune.errors import ConfigError, SlimtuneError, check_whole
from slimtune.storage.source import PACKAGED
from slimtune.studio.uploads import DATA, files_in, receive
from slimtune.studio.view import CurrentView, Page, View

UPLOAD = "/data/files"
PAGE = Page("data", "/data", order=10, uploads=(UPLOAD,))
FIRST_ROWS = 200
LARGE = 4_000_000
"""Bytes from which on the first rows are shown before all are read."""
READ_BY_LINE = ("", ".jsonl", ".csv", ".tsv")
AUTO = "auto"
FIELDS = "data.fields."
_ABSENT: dict[str, Any] = {"labels": {}, "longer": 0, "shared_prefixes": None}
"""What the answer leaves out where it doesn't apply."""
_DEFAULTS = {
    "data.train": "",
    "data.max_length": "1024",
    "training.batch_size": "8",
    "data.format": AUTO,
    "data.chat_template": "",
}


@dataclass(frozen=True)
class Question:
    """What is to be looked at, as the form says it.

    Attributes:
        source: a file, a folder or the id of a data set on the Hub.
        model: whose tokens are counted; empty for characters.
        fields: names of the format's columns, and what they are called in the data.
    """

    source: str
    model: str
    max_length: int
    batch_size: int
    format: str = AUTO
    chat_template: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    packing: bool = False
    skips_bad_rows: bool = False

    @classmethod
    def of(cls, values: Mapping[str, str]) -> Question:
        """Read the form. Raises: ConfigError, for a number that is none."""
        values = {**_DEFAULTS, **{name: text.strip() for name, text in values.items() if text.strip()}}
        source, model = values.get("data.train", ""), values.get("model.name", "")
        fields = {name.removeprefix(FIELDS): text for name, text in values.items() if name.startswith(FIELDS)}
        return cls(
            # A name that begins like an option is still a name.
            f"./{source}" if source.startswith("-") else source,
            model,
            _whole("data.max_length", values["data.max_length"], 2),
            _whole("training.batch_size", values["training.batch_size"], 1),
            values["data.format"],
            values["data.chat_template"] if model else "",
            fields,
            packing=bool(model) and values.get("data.packing") == "true",
            skips_bad_rows=values.get("data.bad_rows") == "skip",
        )

    def arguments(self, rows: int | None = None) -> list[str]:
        """What stands behind `slimtune`; with `rows` the first so many are read."""
        words = ["data", "preview", self.source]
        words += ["--model", self.model] if self.model else []
        words += ["--format", self.format] if self.format != AUTO else []
        words += [word for name, column in self.fields.items() for word in ("--field", f"{name}={column}")]
        words += ["--chat-template", self.chat_template] if self.chat_template else []
        words += ["--skip-bad-rows"] * self.skips_bad_rows
        words += ["--max-length", str(self.max_length), "--batch-size", str(self.batch_size)] if self.model else []
        words += ["--packing"] * self.packing
        return words if rows is None else [*words, "--rows", str(rows)]

    @property
    def query(self) -> str:
        """The settings as the address of another page takes them."""
        values = {"data.train": self.source, "model.name": self.model, "data.chat_template": self.chat_template}
        values |= {"data.fields": json.dumps(self.fields, ensure_ascii=False)} if self.fields else {}
        values |= {"data.format": self.format} if self.format != AUTO else {}
        values |= {"data.max_length": str(self.max_length)} if self.model else {}
        values |= {"data.packing": "true"} if self.packing else {}
        values |= {"data.bad_rows": "skip"} if self.skips_bad_rows else {}
        return urlencode({name: text for name, text in values.items() if text})

    @property
    def bytes(self) -> int:
        """The size of a file, or of those of a folder; 0 for a data set of the Hub."""
        path = Path(self.source)
        try:
            files = [path] if path.is_file() else list(path.iterdir()) if path.is_dir() else []
            return sum(file.stat().st_size for file in files)
        except (OSError, ValueError):
            return 0


@PAGE.get("/data")
def show(view: CurrentView) -> Response:
    """The form; what the address names is looked at as soon as it is shown."""
    view.studio.answers.warm_up()
    values = dict(view.request.query_params)
    # Without a field of the form, it is the first look, which is by tokens.
    model = values.get("model.name", next(iter(PACKAGED)) if "data.train" not in values else "")
    return view.render(
        "data.html.j2",
        values=_DEFAULTS | values | {"model.name": model},
        tab=secrets.token_hex(8),
        files=files_in(view.studio.folder / DATA),
        models=PACKAGED,
        directory=os.getcwd(),
        max_upload=view.studio.access.max_upload,
    )


@PAGE.get("/data/preview")
def preview(view: CurrentView) -> Response:
    """What is known so far of the data that the form names, to be asked for again until all is."""
    question = Question.of(dict(view.request.query_params))
    if not question.source:
        return view.render("data_preview.html.j2", question=None)
    tab = view.request.query_params.get("tab", "")
    whole = view.studio.answers.ask(tab, [*question.arguments(), "--json"])
    first = None
    if whole is None and question.bytes > LARGE:
        # A tab of its own, or each would give the other up.
        first = view.studio.answers.ask(f"{tab}-first", [*question.arguments(FIRST_ROWS), "--json"])
    answer = whole or first
    looked = _ABSENT | answer.value if answer is not None and answer.exit_code == 0 else None
    response = view.render(
        "data_preview.html.j2",
        question=question,
        waits=whole is None,
        refused=answer.sentence if answer is not None and looked is None else "",
        looked=looked,
        is_part=whole is None and looked is not None,
        rows=FIRST_ROWS,
        columns=_columns(question, looked),
        names=_names(question, looked),
        formats=(AUTO, *FORMATS),
        templates=named_templates(),
        samples=_samples(looked),
        command_line=shlex.join(["slimtune", *question.arguments()]),
    )
    response.headers["hx-replace-url"] = f"/data?{_address(view)}"
    return response


@PAGE.post(UPLOAD)
async def upload(view: CurrentView, request: Request, name: str) -> Response:
    """Keep a file that was dropped, and say where."""
    return JSONResponse({"path": str(await receive(view.studio.folder / DATA, name, request.stream()))})


def _columns(question: Question, looked: Any) -> dict[str, str]:
    """The columns that the format has, each with what it is called in the data; empty for one that isn't there."""
    name = looked["sources"][0]["format"] if looked else question.format
    if name not in FORMATS:
        return {}
    fields = (looked["sources"][0]["fields"] if looked else {}) | dict(question.fields)
    needed = dict.fromkeys(column for columns in FORMATS[name].columns for column in columns)
    return {column: fields.get(column, "") for column in (*needed, *FORMATS[name].optional)}


def _samples(looked: Any) -> list[list[tuple[bool, str]]]:
    samples = looked["samples"] if looked else []
    # It brings torch along, for whose seconds the first page of the studio shouldn't wait.
    from slimtune.pipeline.show_data import shortened

    return [shortened([(piece["learned"], piece["text"]) for piece in sample]) for sample in samples]


def _names(question: Question, looked: Any) -> list[str]:
    """What the columns are called in the data; none where it takes long to tell."""
    if looked is not None:
        source = looked["sources"][0]
        fields = source["fields"] | dict(question.fields)
        return [fields.get(column["name"], column["name"]) for column in looked["columns"]]
    if not question.bytes or (question.bytes > LARGE and kind_of(Path(question.source)) not in READ_BY_LINE):
        return []
    try:
        row, _ = next(records(Source(question.source), streaming=True))
    except (SlimtuneError, OSError):
        return []
    return list(row)


def _address(view: View) -> str:
    values = {name: text for name, text in view.request.query_params.items() if name != "tab"}
    kept = {name: text for name, text in values.items() if text != _DEFAULTS.get(name, "") or name == "model.name"}
    return urlencode(kept)


def _whole(place: str, text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError as error:
        raise ConfigError(f"{place} is '{text}'; write a whole number of at least {least}") from error
    check_whole(place, number, least)
    return number
