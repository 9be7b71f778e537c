"""The pages on quantized bases: their examples run, their commands, options, links and marks are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimtune.cli import app

DOCS = Path(__file__).parents[2] / "docs"
NAMES = ("quantized.md", "quantized-merging.md", "torchao.md")
SECTIONS = {
    f"{name} {part.splitlines()[0]}": part
    for name in NAMES
    for part in re.split(r"^#+ ", (DOCS / name).read_text(), flags=re.MULTILINE)[1:]
}
PAGE = "\n".join(SECTIONS.values())
FIGURES = (DOCS / "figures/quantized.md").read_text()
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


def test_the_marks_of_the_tables_come_in_pairs() -> None:
    marks = re.findall(r"<!-- ([\w ]+) -->", FIGURES)
    assert marks
    assert all(marks.count(mark) == 2 for mark in marks)
