"""The page on methods: every method is on it, its examples run, its commands and links are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.core.config import methods

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "methods.md").read_text()
SECTIONS = {part.split("\n")[0]: part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]}
EXAMPLES = [
    (title, code)
    for title, text in SECTIONS.items()
    for code in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_the_example_runs(title: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, title, "exec"), {})


@pytest.mark.parametrize("method", sorted(methods()))
def test_every_method_is_shown_in_use(method: str) -> None:
    name = methods()[method].__name__
    assert any(f"{name}(" in code for _, code in EXAMPLES), name


def anchor(title: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_every_link_inside_of_the_docs_leads_somewhere() -> None:
    anchors = {anchor(title) for title in re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)}
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", PAGE):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        else:
            assert (DOCS / target).exists(), target


def test_the_commands_exist() -> None:
    for command in set(re.findall(r"^slimtune (\w+)", PAGE, re.MULTILINE)):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command
