"""The page on quantized bases: its examples run, its commands, options, links and marks are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimtune.cli import app

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "quantized.md").read_text()
SECTIONS = {part.split("\n")[0]: part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]}
EXAMPLES = [
    pytest.param(code, said, id=f"{title} {number}")
    for title, text in SECTIONS.items()
    for number, (code, said) in enumerate(
        re.findall(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", text, re.MULTILINE | re.DOTALL)
    )
]
COMMANDS = re.findall(r"^slimtune (\w+) (.*?)(?:#|$)", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("code", "said"), EXAMPLES)
def test_the_example_runs_and_prints_what_is_shown(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "quantized.md", "exec"), {})
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("command", "arguments"), COMMANDS)
def test_the_commands_take_their_options(command: str, arguments: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    for option in re.findall(r"--[\w-]+", arguments):
        assert option in shown, (command, option)


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", PAGE):
        file, _, anchor = target.partition("#")
        text = (DOCS / file).read_text() if file else PAGE
        titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert not anchor or anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_marks_of_the_tables_come_in_pairs() -> None:
    marks = re.findall(r"<!-- ([\w ]+) -->", PAGE)
    assert marks
    assert all(marks.count(mark) == 2 for mark in marks)
