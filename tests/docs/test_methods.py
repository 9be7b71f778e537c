"""The pages on methods: every method has one, their examples run, their commands and links are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.core.config import methods

DOCS = Path(__file__).parents[2] / "docs"
PATHS = (DOCS / "methods.md", *sorted((DOCS / "methods").glob("*.md")), DOCS / "diffusion.md")
PAGES = {path.stem: path.read_text() for path in PATHS}
EXAMPLES = [
    (name, code)
    for name, text in PAGES.items()
    for code in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_the_example_runs(title: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, title, "exec"), {})


@pytest.mark.parametrize("method", sorted(methods()))
def test_every_method_is_shown_in_use(method: str) -> None:
    name = methods()[method].__name__
    assert any(f"{name}(" in code for _, code in EXAMPLES), name


def test_every_page_of_a_method_is_linked_from_the_first() -> None:
    linked = set(re.findall(r"\]\(methods/([\w-]+)\.md\)", PAGES["methods"]))
    assert linked == {path.stem for path in (DOCS / "methods").glob("*.md")}


def test_the_commands_exist() -> None:
    for command in set(re.findall(r"^slimtune (\w+)", "\n".join(PAGES.values()), re.MULTILINE)):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command
