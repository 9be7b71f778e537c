"""A page of the docs as its tests read it: its examples, its commands, its links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from slimtune.cli import app

DOCS = Path(__file__).parents[2] / "docs"


def read(name: str) -> str:
    return (DOCS / name).read_text()


def examples(text: str) -> list[Any]:
    """The Python blocks with what they print, named by their section."""
    sections = {part.split("\n")[0]: part for part in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]}
    return [
        pytest.param(code, said, id=f"{title} {number}")
        for title, section in sections.items()
        for number, (code, said) in enumerate(
            re.findall(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", section, re.MULTILINE | re.DOTALL)
        )
    ]


def commands(text: str) -> list[tuple[str, str]]:
    """The commands of slimtune with their arguments."""
    return re.findall(r"^slimtune (\w+) (.*?)(?:#|$)", text, re.MULTILINE)


def check_options(command: str, arguments: str) -> None:
    """See that a command has the options that it is given."""
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    for option in re.findall(r"--[\w-]+", arguments):
        assert option in shown, (command, option)


def check_links(text: str) -> None:
    """See that every link to another page, or to a section, leads somewhere."""
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        other = (DOCS / file).read_text() if file else text
        titles = re.findall(r"^#+ (.+)$", other, re.MULTILINE)
        assert not anchor or anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
