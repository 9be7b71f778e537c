"""The page on data: its commands and its Python run, its recipe is one, and its tables leave nothing out."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.data.chat_template import named_templates
from slimtune.data.formats import FORMATS, TASKS
from slimtune.data.settings import TOO_LONG, DataSettings, Source
from slimtune.data.sources import READERS
from slimtune.recipe.recipe import Recipe
from small_text_model import save_base

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text()
REAL = "smollm2-135m-instruct"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def invoke(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, (words, result.output)
    return result.output


@pytest.fixture
def at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_show_what_is_shown(at_work: Path) -> None:
    """With the real tokenizer; only the training is of a tiny model and short."""
    commands = [line for block in blocks("shell") for line in block.splitlines()]
    save_base(at_work / "base")
    for line in commands:
        if not line.startswith("slimtune "):
            subprocess.run(["bash", "-c", line], check=True)
            continue
        words = shlex.split(line)[1:]
        if words[0] == "train":
            words = [word.replace(REAL, "base") for word in words] + ["training.max_steps=1"]
        shown = invoke(*words)
        if words[0] == "data":
            assert blocks("text")[0] in shown


def test_the_python_prints_what_is_shown(at_work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    invoke("demo-data", "--output", "orders")
    capsys.readouterr()
    exec(compile(blocks("python")[0], "data.md", "exec"), {})
    assert capsys.readouterr().out == blocks("text")[1]


def test_the_recipe_is_one_and_its_sources_are_mixed_as_is_said(at_work: Path) -> None:
    from slimtune.data.reading import exact_shares, read_splits

    (at_work / "recipe.yaml").write_text(blocks("yaml")[0])
    invoke("demo-data", "--output", "orders", "--train", "20", "--held-out", "4")
    with (at_work / "faq.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *((f"q{n}", f"a{n}") for n in range(4))])
    parts = read_splits(Recipe.read(at_work / "recipe.yaml").data)
    assert exact_shares(parts.train) == [18, 6]
    assert [part.format for part in parts.train] == ["messages", "prompt-completion"]


def test_every_format_and_its_tasks_are_in_the_table() -> None:
    for name, known in FORMATS.items():
        (line,) = re.findall(rf"^\| `{re.escape(name)}` \|.*$", PAGE, re.MULTILINE)
        _, _, needed, _, tasks, _ = (cell.strip() for cell in line.split("|"))
        assert set(tasks.split(", ")) == {task for task, names in TASKS.items() if name in names}
        assert all(f"`{column}`" in needed for columns in known.columns for column in columns)


def test_every_kind_of_file_and_every_setting_is_named() -> None:
    for name in (*READERS, *(field.name for field in fields(Source)), *TOO_LONG, *named_templates()):
        assert f"`{name}`" in PAGE, name
    for field in fields(DataSettings):
        assert re.search(rf"^\| `{field.name}` \|", PAGE, re.MULTILINE), field.name


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", PAGE):
        assert (Path(__file__).parents[2] / "docs" / target).exists(), target
