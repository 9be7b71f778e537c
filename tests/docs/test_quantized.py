"""The page on quantized bases: its examples run, its commands, options, links and marks are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.page import check_links, check_options, commands, examples, read

PAGE = read("quantized.md")


@pytest.mark.parametrize(("code", "said"), examples(PAGE))
def test_the_example_runs_and_prints_what_is_shown(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "quantized.md", "exec"), {})
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("command", "arguments"), commands(PAGE))
def test_the_commands_take_their_options(command: str, arguments: str) -> None:
    check_options(command, arguments)


def test_every_link_leads_somewhere() -> None:
    check_links(PAGE)


def test_the_marks_of_the_tables_come_in_pairs() -> None:
    marks = re.findall(r"<!-- ([\w ]+) -->", PAGE)
    assert marks
    assert all(marks.count(mark) == 2 for mark in marks)
