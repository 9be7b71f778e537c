"""The pages on quantized bases: their examples run, their commands, options, links and marks are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.page import check_options, commands, examples, read

PAGE = "\n".join(read(name) for name in ("quantized.md", "quantized-merging.md", "torchao.md"))
FIGURES = read("figures/quantized.md")


@pytest.mark.one_in(3)
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


def test_the_marks_of_the_tables_come_in_pairs() -> None:
    marks = re.findall(r"<!-- ([\w ]+) -->", FIGURES)
    assert marks
    assert all(marks.count(mark) == 2 for mark in marks)
