"""The page on quantization after training: its example runs, its commands, options, links and marks are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.page import check_links, check_options, commands, examples, read
from slimtune.slim.data import TOKENS, WINDOW
from slimtune.slim.quantize import BITS, METHODS

PAGE = read("quantizing.md")


@pytest.mark.parametrize(("code", "said"), examples(PAGE))
def test_the_example_runs_and_prints_what_is_shown(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "quantizing.md", "exec"), {})
    assert said.strip() in capsys.readouterr().out


@pytest.mark.parametrize(("command", "arguments"), commands(PAGE))
def test_the_commands_take_their_options(command: str, arguments: str) -> None:
    check_options(command, arguments)


def test_what_the_page_lists_is_what_there_is() -> None:
    assert set(re.findall(r"^\| `(W\w+)` \|", PAGE, re.MULTILINE)) == set(BITS)
    assert set(re.findall(r"^\| `([a-z+]+)` \|", PAGE, re.MULTILINE)) == set(METHODS)
    assert f"at most {TOKENS:,} tokens in windows of {WINDOW}" in PAGE
    check_links(PAGE)


def test_the_tables_are_where_the_benchmark_looks_for_them() -> None:
    for name in ("quality", "speed"):
        assert PAGE.count(f"<!-- {name} -->") == 2
