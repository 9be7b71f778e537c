"""The page on evaluation: its commands run on small models, its Python prints what is shown, its options exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.evaluate.scorers import SCORERS
from small_encoder import reviews, save_encoder
from small_text_model import save_base, write_lines

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
COMMANDS = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^slimtune .*$", PAGE, re.MULTILINE)]
HARNESS = [command for command in COMMANDS if "--lm-eval" in command]
REAL = "smollm2-135m-instruct"


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the page names, the models tiny."""
    folder = tmp_path_factory.mktemp("page")
    invoke("demo-data", "-o", folder / "orders", "--train", 12, "--held-out", 4)
    save_base(folder / "base")
    invoke("train", folder / "base", folder / "orders/train.jsonl", "-o", folder / "my-adapter", "--max-steps", 1)
    rows = write_lines(folder / "reviews.jsonl", *reviews(8))
    invoke("train", save_encoder(folder / "encoder"), rows, "-o", folder / "judge", "--max-steps", 1)
    words = {"tokens": ["the", "film", "was", "good"], "tags": ["O", "B-PART", "O", "B-OPINION"]}
    tagged = write_lines(folder / "tagged.jsonl", *[words] * 4)
    invoke("train", folder / "encoder", tagged, "-o", folder / "tuned-tagger", "--max-steps", 1)
    (block,) = re.findall(r"^```python\n# scorer.py\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (folder / "scorer.py").write_text(block)
    return folder


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in HARNESS], ids=" ".join)
def test_the_commands_run(command: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    command = ["base" if word == REAL else word for word in command]
    answers = [place / "answers.jsonl", place / "tags.jsonl"]
    for path in answers:
        path.unlink(missing_ok=True)
    options = [] if "--limit" in command else ["--limit", 2]
    printed = invoke(*command, *options, *([] if {"tuned-tagger", "judge"} & set(command) else ["--max-new-tokens", 8]))
    assert not {"--json"} & set(command) or json.loads(printed)["count"] == 2
    assert any(path.exists() for path in answers) == ("--answers" in command)


def test_a_line_of_tags_has_the_keys_that_are_shown(place: Path) -> None:
    (shown,) = re.findall(r'^(\{"question".*?\}\]\})$', PAGE, re.MULTILINE | re.DOTALL)
    invoke("evaluate", place / "tuned-tagger", place / "tagged.jsonl", "--answers", place / "lines.jsonl")
    line = json.loads((place / "lines.jsonl").read_text().splitlines()[0])
    assert json.loads(shown).keys() == line.keys()
    assert all(set(json.loads(shown)[name][0]) == {"kind", "start", "end", "text"} for name in ("missed", "wrong"))


@pytest.mark.parametrize("command", HARNESS, ids=" ".join)
def test_the_options_exist(command: list[str]) -> None:
    shown = CliRunner().invoke(app, [command[0], "--help"], env={"COLUMNS": "200"}).output
    for option in command:
        assert not option.startswith("--") or option in shown


def test_the_python_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ((code, said),) = re.findall(r"^```python\n(from .*?)^```\n\n```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    invoke("demo-data", "-o", tmp_path / "orders")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "evaluation.md", "exec"), {})
    assert capsys.readouterr().out == said


def test_every_scorer_is_on_the_page() -> None:
    for name in set(SCORERS) - {"reasoning_gym"}:
        assert f"| `{name}` |" in PAGE
