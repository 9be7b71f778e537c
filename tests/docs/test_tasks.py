"""The pages on tasks and on preferences: their commands run on tiny models, what they show is right."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.data.tasks.registry import TASK_DATA
from slimtune.recipe.preference import LOSSES, TAKEN, PreferenceSettings
from small_encoder import save_encoder
from small_seq2seq import save_seq2seq, translations
from small_text_model import save_base, write_lines

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {name: (DOCS / f"{name}.md").read_text() for name in ("tasks", "preferences")}
MODELS = {"smollm2-135m-instruct": "base", "minilm-l6-v2": "encoder", "t5-base-or-folder": "t5"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages speak of, small."""
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base")
    save_encoder(tmp_path / "encoder")
    save_seq2seq(tmp_path / "t5", "t5")
    for page in PAGES.values():
        for command in re.findall(r"^cat > \S+ <<'END'\n.*?^END$", page, re.MULTILINE | re.DOTALL):
            subprocess.run(["bash", "-c", command], check=True)
    (code,) = re.findall(r"^```python\n# judge.py\n(.*?)^```", PAGES["preferences"], re.MULTILINE | re.DOTALL)
    (tmp_path / "judge.py").write_text(code)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_run_one_after_the_other(page: str, folder: Path) -> None:
    pairs = [{"prompt": f"{n} teas", "chosen": "yes please", "rejected": "no"} for n in range(8)]
    write_lines(folder / "pairs.jsonl", *(translations() if page == "tasks" else pairs))
    commands = re.findall(r"^slimtune .*$", PAGES[page], re.MULTILINE)
    assert len(commands) > 3
    for line in commands:
        words = [MODELS.get(word, word) for word in shlex.split(line, comments=True)[1:]]
        result = CliRunner().invoke(app, words, input="/exit\n" if words[0] == "chat" else None)
        assert result.exit_code == 0, (line, result.output)


def test_the_settings_that_are_shown_are_those_of_the_task() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGES["preferences"], re.MULTILINE | re.DOTALL)
    shown = yaml.safe_load(block)
    PreferenceSettings(**shown["preferences"]).check_for(shown["task"])
    named = set(re.findall(r"`(\w+)`", PAGES["preferences"])) | set(shown["preferences"])
    assert named >= {name for taken in TAKEN.values() for name in taken} | {"reward"}
    assert set(re.findall(r"(\w+),", block.partition("dpo: hinge")[2].partition(";")[0])) <= set(LOSSES["dpo"])


def test_every_task_is_in_the_table() -> None:
    table = "\n".join(line for line in PAGES["tasks"].splitlines() if line.startswith("| `"))
    assert {task for task in TASK_DATA if f"`{task}`" in table} == set(TASK_DATA)


def test_links_lead_somewhere() -> None:
    for page in PAGES.values():
        for target in re.findall(r"\]\((?!https?://)([^)]+)\)", page):
            assert (DOCS / target).exists(), target
