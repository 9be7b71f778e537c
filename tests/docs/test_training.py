"""The page on training: its commands run on tiny models, its tables leave nothing out."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.recipe.training import TrainSettings
from small_text_model import save_base

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
REAL = "smollm2-135m-instruct"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the tiny base stands under the name of the real one."""
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base")
    return tmp_path


def invoke(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, (words, result.output)
    return result.output


def test_the_commands_run_one_after_the_other(at_work: Path) -> None:
    """With few rows, and a tenth of the steps."""
    for line in "".join(blocks("shell")).splitlines():
        words = shlex.split(line.replace(REAL, "base"))[1:]
        if words[0] == "demo-data":
            words += ["--train", "20", "--held-out", "4"]
        words = [re.sub(r"^40$", "4", re.sub(r"(eval_steps)=10", r"\1=1", word)) for word in words]
        if "training.report_to=tensorboard" in words and find_spec("tensorboard") is None:
            assert "pip install tensorboard" in invoke(*words, code=2)
        elif "--resume" in words:
            assert "nothing to resume" in invoke(*words, code=2)
        else:
            shown = invoke(*words)
            assert ("the best by loss" in shown) == ("training.keep_best=loss" in words)


def test_the_folder_holds_what_the_table_says(at_work: Path) -> None:
    (table,) = re.findall(r"^## What a run's folder holds\n\n(.*)", PAGE, re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`([\w.]+)`", table)) - {"peft"}
    invoke("demo-data", "--output", "orders", "--train", "8", "--held-out", "4")
    recipe = ["training.eval_steps=1", "training.samples=1", "evaluation={forgetting: false, limit: 1}"]
    held_out = ["data.held_out=orders/held_out.jsonl", "--max-steps", "2"]
    invoke("train", "base", "orders/train.jsonl", "--output", "tuned", *held_out, *recipe)
    found = {path.name for path in (at_work / "tuned").iterdir()}
    assert found - named <= {"tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"}
    assert named - found == {"runs", "forgetting.json"}


def test_every_setting_is_in_the_table_with_its_default() -> None:
    for field in fields(TrainSettings):
        (line,) = re.findall(rf"^\| [^|]*`{field.name}`.*$", PAGE, re.MULTILINE)
        _, names, defaults, *_ = (cell.strip() for cell in line.split("|"))
        place = names.split(", ").index(f"`{field.name}`")
        said = defaults.split(", ")[min(place, len(defaults.split(", ")) - 1)].strip("`")
        if isinstance(field.default, float | int | str) and not isinstance(field.default, bool):
            assert said == (f"{field.default:g}" if isinstance(field.default, float) else str(field.default)), (
                field.name
            )
        else:
            assert said in ("none", "off", "linear", "the method's own", "each epoch"), field.name


def test_the_script_trains_on_two_processes(at_work: Path) -> None:
    invoke("demo-data", "--output", "orders", "--train", "20", "--held-out", "4")
    (script,) = blocks("python")
    script = script.replace(REAL, "base").replace("max_steps=40", "max_steps=2, use_cpu=True, max_length=64")
    (at_work / "several.py").write_text(script)
    (launch,) = re.findall(r"run by: torchrun (.*)$", script, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *launch.split()], capture_output=True,
        text=True, check=False, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "LoRA" in invoke("info", "tuned-by-two")


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", PAGE):
        assert (Path(__file__).parents[2] / "docs" / target).exists(), target
