"""The page on planning: its Python runs, its commands exist, and it names every rule and the classic figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.plan.rules import GOALS, RULES
from slimtune.plan.table import ROWS

PAGE = (Path(__file__).parents[2] / "docs/planning.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
def test_the_python_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "planning.md", "exec"), {})


def test_options_that_it_names_exist() -> None:
    shown = CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "200"}).output
    for option in set(re.findall(r"`(--[a-z-]+)", PAGE)) - {"--method", "--no-plan"}:
        assert option in shown, option


def test_every_rule_and_goal_is_named() -> None:
    for name in (*RULES, *GOALS):
        assert name in PAGE, name


def test_the_rules_of_thumb_are_in_the_table() -> None:
    for row in ROWS:
        (line,) = re.findall(rf"^\| {re.escape(row.name)} \|.*$", PAGE, re.MULTILINE)
        assert [int(figure) for figure in re.findall(r"\((\d+)\)", line)] == list(row.rule_of_thumb)
