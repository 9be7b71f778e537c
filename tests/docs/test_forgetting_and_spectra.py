"""The pages on forgetting and spectra: their Python runs, and their commands, options, domains and links are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.evaluate.domain_texts import DOMAINS, texts
from slimtune.evaluate.forgetting import CONFIDENCE, DRAWS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {name: (DOCS / f"{name}.md").read_text() for name in ("forgetting", "spectra")}


def code(name: str, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", PAGES[name], re.MULTILINE | re.DOTALL)
    return [text for kind, text in blocks if kind == language]


@pytest.mark.parametrize("name", PAGES)
def test_the_python_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for snippet in code(name, "python"):
        exec(compile(snippet, f"{name}.md", "exec"), {})


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_options_exist(name: str) -> None:
    lines = [shlex.split(line) for block in code(name, "") for line in block.splitlines()]
    assert all(line[:2] == ["slimtune", name] for line in lines)
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
    named = {word for line in lines for word in line if word.startswith("--")}
    for option in named | set(re.findall(r"`(--[a-z-]+)", PAGES[name])):
        assert option in shown, option


@pytest.mark.parametrize("name", PAGES)
def test_every_link_inside_of_the_docs_leads_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", PAGES[name]):
        assert (DOCS / target).exists(), target


def test_every_domain_and_figure_is_named() -> None:
    page = PAGES["forgetting"]
    rows = re.findall(r"^\| (\w+) \|", page, re.MULTILINE)[1:]
    assert rows == list(DOMAINS)
    assert f"{DRAWS:,}" in page
    assert f"{CONFIDENCE:.0%}" in page
    assert f"{sum(map(len, texts().values()))} texts" in page


def test_the_table_of_the_benchmark_has_its_place() -> None:
    assert PAGES["spectra"].count("<!-- intruders -->") == 2
