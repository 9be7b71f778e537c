"""Preferences and rewards by recipe: `slimtune train ... task=dpo`, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from slimtune.recipe.recipe import Recipe
from small_text_model import write_lines

FAST = ["--max-steps", 4, "--lr", 0.01, "--batch-size", 4, "--rank", 4]
PROMPTS = ["two large lattes", "one tea for maria", "a small flat white", "three espressos to go"]
PAIRS = [{"prompt": p, "chosen": f"yes please {i}", "rejected": f"no way {i}"} for i in range(3) for p in PROMPTS]
JUDGED = [
    {"prompt": p, "completion": answer, "label": answer != "no way"}
    for p in PROMPTS
    for answer in ("yes please", "no way")
]
QUESTIONS = [{"prompt": p, "answer": "yes"} for p in PROMPTS]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("rows") / "pairs.jsonl", *PAIRS)


@pytest.mark.parametrize("task", ["dpo", "orpo", "kto"])
def test_pairs_are_learned_by_name(run: Any, base: Path, pairs: Path, tmp_path: Path, task: str) -> None:
    out = tmp_path / "out"
    trained = run("train", base, pairs, f"task={task}", "-o", out, "data.held_out=0.34", "--json", *FAST)
    assert trained.exit_code == 0, trained.output
    result = json.loads(trained.stdout)
    # A share of the odds moves ORPO's rewards, and four steps little.
    assert result["scores"]["rewards/margins"] > (-0.1 if task == "orpo" else 0)
    lines = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    assert any("rewards/margins" in line for line in lines)
    assert any("eval_rewards/margins" in line for line in lines)
    recipe = Recipe.read(out / "recipe.yaml")
    assert recipe.task == task
    assert recipe == Recipe.of(yaml.safe_load((out / "recipe.yaml").read_text()))
    assert (out / "adapter_model.safetensors").is_file()
    assert not list(out.glob("checkpoint-*"))
    assert run("generate", base, "one tea", "--adapter", out, "--max-new-tokens", 4).exit_code == 0


def test_the_best_weights_are_those_with_most_pairs_in_order(run: Any, base: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    keep = ["training.keep_best=rewards/margins", "training.eval_steps=1", "training.save_steps=1"]
    trained = run("train", base, pairs, "task=dpo", "-o", out, "data.held_out=0.34", "--json", *FAST, *keep)
    assert trained.exit_code == 0, trained.output
    lines = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    margins = [line["eval_rewards/margins"] for line in lines if "eval_loss" in line]
    assert len(margins) == 4
    assert json.loads(trained.stdout)["scores"]["rewards/margins"] == max(margins)


def test_a_recipe_says_how_strongly_the_base_holds(run: Any, base: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "judged.jsonl", *JUDGED)
    recipe = {
        "task": "kto",
        "model": {"name": str(base)},
        "data": {"train": str(tmp_path / "judged.jsonl")},
        "training": {"max_steps": 2, "batch_size": 4},
        "preferences": {"beta": 0.3, "desirable_weight": 1.5},
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    trained = run("train", tmp_path / "recipe.yaml", "preferences.beta=0.2")
    assert trained.exit_code == 0, trained.output
    written = Recipe.read(tmp_path / "out" / "recipe.yaml")
    assert written.preferences.given == {"beta": 0.2, "desirable_weight": 1.5}
    assert written.training.learning_rate == pytest.approx(2e-5)


def test_answers_are_drawn_and_rewarded(run: Any, base: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "questions.jsonl", *QUESTIONS)
    (tmp_path / "judge.py").write_text(
        "def vowels(completions, answer, **columns):\n"
        "    assert set(answer) == {'yes'}\n"
        "    return [text.count('e') for text in completions]\n"
    )
    out = tmp_path / "out"
    settings = [f"preferences.reward={tmp_path}/judge.py:vowels", "preferences.generations=4"]
    trained = run("train", base, data, "task=grpo", *settings, "preferences.max_new_tokens=8", "-o", out, *FAST)
    assert trained.exit_code == 0, trained.output
    lines = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    assert all("reward" in line for line in lines)


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_recipe_is_checked_without_training(run: Any, base: Path, pairs: Path, tmp_path: Path, name: str) -> None:
    data = pairs if name == "dpo" else write_lines(tmp_path / "questions.jsonl", *QUESTIONS)
    assert run("recipe", "init", tmp_path / "recipe.yaml", "--for", name).exit_code == 0
    overrides = [f"model.name={base}", f"data.train={data}"]
    checked = run("recipe", "check", tmp_path / "recipe.yaml", *overrides, "--json")
    assert checked.exit_code == 0, checked.output
    found = json.loads(checked.stdout)
    assert 0 < found["needed_bytes"] < found["memory_bytes"]
    assert any("drawing the answers is an estimate" in note for note in found["notes"]) == (name == "grpo")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "can be learned from in several ways; say which: task=dpo, orpo or kto"),
        (["task=dpo", "preferences.bta=1"], "did you mean 'beta'"),
        (["task=dpo", "preferences.reward=exact-match"], "reward would change nothing with task dpo"),
        (["preferences.beta=0.2"], "beta would change nothing with task auto"),
        (["task=dpo", "data.packing=true"], "packing is for models that write text, and not for task dpo"),
        (["task=dpo", "training.samples=2"], "training.samples would change nothing with task dpo"),
        (["task=grpo"], "needs the field answer"),
        (["task=dpo", "--max-length", 8], "are longer than 8 tokens"),
    ],
)
def test_mistakes_are_told_before_training(
    run: Any, base: Path, pairs: Path, tmp_path: Path, options: list[Any], complaint: str
) -> None:
    refused = run("train", base, pairs, "-o", tmp_path / "out", *options)
    assert refused.exit_code == 2, refused.output
    assert complaint in refused.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_reward_that_is_not_there_costs_no_model(run: Any, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "questions.jsonl", *QUESTIONS)
    options = ["task=grpo", "preferences.reward=judge.py:vowels"]
    refused = run("train", "no/such-model", data, "-o", tmp_path / "out", *options)
    assert "no file judge.py with a reward" in refused.stderr


def test_long_pairs_are_counted_and_dropped_or_cut(run: Any, base: Path, tmp_path: Path) -> None:
    longer = [{"prompt": "tea", "chosen": "yes " * 60, "rejected": "no"}, {**PAIRS[0], "prompt": "latte " * 60}]
    data = write_lines(tmp_path / "rows.jsonl", *longer, *PAIRS)
    options = ["task=dpo", "--max-length", 48, *FAST]
    dropped = run("train", base, data, "-o", tmp_path / "dropped", "data.too_long=drop", *options)
    assert dropped.exit_code == 0, dropped.output
    assert "2 rows dropped" in dropped.stdout
    cut = run("train", base, data, "-o", tmp_path / "cut", "data.too_long=truncate", *options)
    assert cut.exit_code == 0, cut.output
    assert "1 row cut" in cut.stdout
    assert "1 row dropped" in cut.stdout
