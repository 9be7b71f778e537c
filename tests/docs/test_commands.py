"""Every command of every page is one that the parser takes, on files that the page has made; and all run (soak).

What isn't run: blocks that say what they need, `pip install`, and `serve` and `studio`, which run until they are
stopped, as `test_serving` and `tests/studio` do it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from doc_pages import DOCS, Desk, Step, paths, story
from slimtune.cli import app
from small_encoder import save_encoder
from small_text_model import save_base

IDS = {"ids": lambda page: str(page.relative_to(DOCS))}
NEEDS = {
    "the Hub", "data sets of the Hub", "a T5 of the Hub", "vLLM", "vLLM on two machines with GPUs",
    "an Ollama that runs",
    "four GPUs", "a pipeline", "optimum", "labelled/train.jsonl and labelled/held_out.jsonl",
    "a download, and a checkout", "a password file",
}  # fmt: skip
"""What blocks say that they need."""
REAL = {"smollm2-135m-instruct": "base", "llama-2-7b": "base", "minilm-l6-v2": "encoder"}
UNTIL_STOPPED = (["serve"], ["studio"])
"""Commands that run until they are stopped, which other tests do."""
QUICK = {
    "train": ["--max-steps", "1"], "distill": ["--max-steps", "1"], "evaluate": ["--limit", "2"],
    "demo-data": ["--train", "40", "--held-out", "8"], "compare": ["--dry-run"],
}  # fmt: skip
"""What is added to commands for which tiny models would still take long, unless the page says it."""
MOST_STEPS = 10
"""Of those that a page says, as many are taken: every setting of the pages acts within them."""


@pytest.mark.parametrize("page", paths(), **IDS)
def test_the_commands_are_taken_and_read_what_was_made(page: Path) -> None:
    told = story(page)
    desk = Desk(told)
    for step in told:
        assert not (problem := desk.take(step)), (step.text, problem)


def test_pages_without_commands_are_few() -> None:
    assert len(paths()) > 15


def test_what_needs_more_than_a_machine_is_known() -> None:
    assert {step.needs for page in paths() for step in story(page)} - {""} == NEEDS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models in place of the real ones, as deep as the pages' `--layers 25` wants, and what the README leaves."""
    folder = tmp_path_factory.mktemp("models")
    save_base(folder / "base", num_hidden_layers=26)
    save_encoder(folder / "encoder")
    base, orders, adapter = (str(folder / name) for name in ("base", "orders", "my-adapter"))
    for words in (
        ["demo-data", "--output", orders, *QUICK["demo-data"]],
        ["train", base, f"{orders}/train.jsonl", "--output", adapter, "--max-steps", "1"],
    ):
        result = typed(words)
        assert result.exit_code == 0, result.output
    return folder


@pytest.mark.soak
@pytest.mark.parametrize("page", paths(), **IDS)
def test_the_commands_run(page: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, the models tiny and the steps few."""
    monkeypatch.chdir(tmp_path)
    told = story(page)
    for name in Desk(told).made:
        shutil.copytree(models / name, tmp_path / name)
    for step in told:
        if step.file:
            Path(step.file).write_text(step.text)
        elif not step.needs and step.words[:1] not in UNTIL_STOPPED and not step.text.startswith("pip install "):
            run(step, models)
            for recipe in Path.cwd().glob("*.yaml"):
                text = recipe.read_text()
                recipe.write_text(re.sub("|".join(REAL), lambda real: str(models / REAL[real[0]]), text))


def run(step: Step, models: Path) -> None:
    """Do one step, and see that it comes to what it should."""
    if not step.words:
        subprocess.run(["bash", "-c", step.text], check=True)
        return
    words = [str(models / REAL[word]) if word in REAL else word for word in fewer_steps(step.words)]
    quick = QUICK.get(words[0], [])
    if not any(re.search(r"max[-_]steps|--limit|--dry-run|^features$", word) for word in words):
        is_recipe = words[0] == "train" and words[1].endswith(".yaml")
        words += ["training.max_steps=1"] if is_recipe else quick
    words += ["--max-kl", "1"] if "Q8_0" in words else []
    # The tiny model is below what a page asks of a real one.
    words = ["1MB" if words[i - 1] == "--under" else word for i, word in enumerate(words)]
    result = typed(words)
    if "--resume" in words or "--scale-intruders" in words:
        # A run that was not broken off, and a tiny model's weights, in which nothing intrudes.
        assert result.exit_code == 0 or re.search("nothing to (resume|scale)", result.output), result.output
    elif "pip install" not in result.output or result.exit_code == 0:
        assert result.exit_code == 0, (step.text, result.output)
    if target := re.search(r" > (\S+)$", step.text):
        Path(target[1]).write_text(result.stdout)


def fewer_steps(words: list[str]) -> list[str]:
    """The words of a command, with no more steps than `MOST_STEPS`."""

    def fewer(steps: re.Match[str]) -> str:
        return steps[1] + str(min(int(steps[2]), MOST_STEPS))

    return re.sub(r"(max[-_]steps[=\0])(\d+)", fewer, "\0".join(words)).split("\0")


def typed(words: list[str]) -> Result:
    """A command, in this process."""
    return CliRunner().invoke(app, words, input="/exit\n")
