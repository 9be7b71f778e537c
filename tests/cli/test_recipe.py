"""A recipe on the command line: trained, run again to the same bits, checked, written and shown."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from slimtune.recipe.recipe import Recipe
from slimtune.recipe.shipped import commented, shipped, text_of
from slimtune.storage.source import PACKAGED
from small_text_model import write_lines


@pytest.fixture
def recipe(base: Path, data: Path, tmp_path: Path) -> Path:
    """Five steps of a tiny model."""
    sections = {
        "model": {"name": str(base)},
        "data": {"train": str(data), "held_out": 0.1},
        "method": {"name": "lora", "r": 4},
        "training": {"max_steps": 5, "batch_size": 4, "learning_rate": 0.01},
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def refused(result: Any, *said: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("slimtune: ")
    assert result.stderr.count("\n") == 1
    for part in said:
        assert part in result.stderr


def test_a_recipe_is_trained_and_written_in_full(run: Any, recipe: Path, base: Path, tmp_path: Path) -> None:
    result = run("train", recipe, "training.max_steps=3", "--json")
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    printed, results = json.loads(result.stdout), json.loads((out / "results.json").read_text())
    assert printed == {"output": str(out), **results}
    assert (results["steps"], results["method"], results["base"]) == (3, "lora", str(base))
    assert results["examples"] == 22
    assert results["tokens_per_second"] == pytest.approx(results["tokens"] / results["seconds"])
    assert results["eval_loss"] > 0
    assert results["trainable_parameters"] < results["parameters"]
    assert results["peak_rss_bytes"] > 50e6
    assert results["disk_bytes"] == sum(p.stat().st_size for p in out.rglob("*") if p.name != "results.json")
    assert {"slimtune", "torch", "transformers", "python"} <= results["versions"].keys()
    written = Recipe.read(out / "recipe.yaml")
    assert written == Recipe.read(recipe, ["training.max_steps=3"])
    assert yaml.safe_load((out / "recipe.yaml").read_text())["training"]["seed"] == 0


@pytest.mark.slow
def test_the_written_recipe_gives_the_same_adapter(run: Any, recipe: Path, tmp_path: Path) -> None:
    def weights(name: str, *arguments: Any) -> dict[str, torch.Tensor]:
        result = run("train", *arguments, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
        return load_file(tmp_path / name / "adapter_model.safetensors")

    first = weights("out", recipe)
    again = weights("again", tmp_path / "out" / "recipe.yaml")
    other = weights("other", recipe, "training.seed=1")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_held_out_questions_are_asked_and_forgetting_is_measured(
    run: Any, recipe: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    asks = "evaluation={scorer: exact_match, max_new_tokens: 4, forgetting: true}"
    result = run("train", recipe, asks, "training.max_steps=1", "--json")
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)
    assert results["evaluation"]["count"] == 2
    assert results["scores"] == {"exact_match": results["evaluation"]["scores"]["exact_match"]}
    forgotten = json.loads((tmp_path / "out" / "forgetting.json").read_text())
    assert len(forgotten["domains"]) == 6
    assert "exact_match on held-out examples" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["evaluation={}", "data.held_out=0"], "set data.held_out"),
        (["evaluation.scorer=exact_mach"], "did you mean 'exact_match'?"),
        (["evaluation.scorr=auto"], "did you mean 'scorer'?"),
        (["evaluation.scorer=accuracy", "evaluation.limit=0"], "limit"),
        (["evaluation={}", "method={name: features}", "training={}"], "would change nothing with the method features"),
    ],
)
def test_evaluations_that_are_refused(run: Any, recipe: Path, tmp_path: Path, overrides: list[str], said: str) -> None:
    refused(run("train", recipe, *overrides), said)
    assert not (tmp_path / "out").exists()


def test_a_classifier_is_not_asked_questions(run: Any, recipe: Path, tmp_path: Path) -> None:
    from small_encoder import reviews

    rows = write_lines(tmp_path / "rows.jsonl", *reviews(20))
    refused(run("train", recipe, f"data.train={rows}", "evaluation={}"), "leave evaluation out")


def test_options_and_recipe_say_the_same(run: Any, recipe: Path, base: Path, data: Path, tmp_path: Path) -> None:
    options = ["--rank", 4, "--max-steps", 5, "--batch-size", 4, "--lr", 0.01, "data.held_out=0.1"]
    made = run("train", base, data, "-o", tmp_path / "out", *options)
    assert made.exit_code == 0, made.output
    assert Recipe.read(tmp_path / "out" / "recipe.yaml") == Recipe.read(recipe)


def test_the_last_step_is_logged_whatever_is_between(run: Any, recipe: Path, tmp_path: Path) -> None:
    result = run("train", recipe, "training.logging_steps=3", "data.held_out=0", "--json")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "out" / "loss.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 5]
    assert json.loads(result.stdout)["final_loss"] == lines[-1]["loss"]


def test_settings_of_a_recipe_go_behind_the_data_as_well(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    made = run("train", base, data, "training.max_steps=1", "method.r=2", "-o", tmp_path / "out")
    assert made.exit_code == 0, made.output
    written = Recipe.read(tmp_path / "out" / "recipe.yaml")
    assert (written.training.max_steps, written.method.config().r) == (1, 2)


def test_the_help_shows_the_recipes_defaults() -> None:
    """Options are left to the recipe unless they are given, so what the help says must be what it does."""
    import inspect

    from slimtune.cli.train import train
    from slimtune.recipe.recipe import keys

    places = keys()
    for name, parameter in inspect.signature(train).parameters.items():
        section, _, key = places.get(name, "").partition(".")
        if key:
            assert parameter.default == Recipe.sections()[section].__dataclass_fields__[key].default, name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["training.learnin_rate=1"], ["unknown key training.learnin_rate", "did you mean 'learning_rate'?"]),
        (["training.epochs=three"], ["training.epochs takes a number"]),
        (["training.epochs"], ["section.key=value", "'training.epochs'"]),
        (["modle.name=x"], ["unknown key modle", "did you mean 'model'?"]),
        (["method.rank=8"], ["method.rank", "did you mean 'r'?"]),
        (["method.name=lorra"], ["did you mean 'lora'?"]),
        (["--lr", "1e-4"], ["--learning-rate does not go with a recipe", "section.key=value"]),
        (["data.train=nothing.jsonl"], ["nothing.jsonl"]),
    ],
)
def test_mistakes_in_a_recipe(run: Any, recipe: Path, tmp_path: Path, arguments: list[str], said: list[str]) -> None:
    refused(run("train", recipe, *arguments), *said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"), [("", "is empty"), ("- a", "is a list"), ("a: [", "is not YAML"), ("a: 1\na: 2", "twice")]
)
def test_files_that_hold_no_recipe(run: Any, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    refused(run("train", tmp_path / "recipe.yaml"), said)


def test_a_recipe_that_is_not_there_and_a_folder_that_is(run: Any, recipe: Path, tmp_path: Path) -> None:
    refused(run("train", tmp_path / "recpie.yaml"), "did you mean 'recipe.yaml'?")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    refused(run("train", recipe), "already holds", "--overwrite")
    refused(run("train", recipe, "-o", recipe), "is a file")
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_a_model_without_data_or_output(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    refused(run("train", base, "-o", tmp_path / "out"), "no data")
    refused(run("train", base, "training.epochs=1", "-o", tmp_path / "out"), "no data")
    refused(run("train", base, data), "--output")


def test_check_says_what_training_would_do(run: Any, recipe: Path, tmp_path: Path) -> None:
    result = run("recipe", "check", recipe, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ok"]
    assert not found["problems"]
    assert found["data"]["examples"] == 22
    assert found["needed_bytes"] > 1e6
    assert not (tmp_path / "out").exists()
    assert "can be trained" in run("recipe", "check", recipe).stdout


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.epohcs=1", "did you mean 'epochs'?"),
        ("method.target_modules=[q_prj]", "did you mean 'q_proj'?"),
        ("data.train=nothing.jsonl", "nothing.jsonl"),
        ("data.max_length=4", "longer than 4 tokens"),
        ("model.name=nowhere/at-all", "nowhere/at-all"),
        ("training.optim=paged_adamw_8bit", "adamw_8bit"),
        ("model.device=cuda:9", "cuda:9"),
    ],
)
def test_check_ends_with_1_for_what_is_wrong(run: Any, recipe: Path, override: str, said: str) -> None:
    result = run("recipe", "check", recipe, override, "--json")
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert not found["ok"]
    assert any(said in problem for problem in found["problems"])


def test_check_of_packed_rows(run: Any, recipe: Path) -> None:
    result = run("recipe", "check", recipe, "data.packing=true", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["data"]["examples"] == 22


def test_check_of_preferences(run: Any, recipe: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", *rows_of("dpo"))
    check = ("recipe", "check", recipe, f"data.train={data}", "task=dpo", "--json")
    found = json.loads(run(*check).stdout)
    assert found["ok"]
    assert found["needed_bytes"] > 0
    wrong = json.loads(run(*check, "method.target_modules=[q_prj]").stdout)
    assert any("did you mean 'q_proj'?" in problem for problem in wrong["problems"])


def test_check_names_several_problems_at_once(run: Any, recipe: Path) -> None:
    result = run("recipe", "check", recipe, "model.device=cuda:9", "data.train=nothing.jsonl", "--json")
    assert len(json.loads(result.stdout)["problems"]) == 2


def test_check_refuses_what_does_not_fit(run: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimtune.plan import devices

    small = replace(devices.find("cpu"), memory_bytes=50_000_000)
    monkeypatch.setattr("slimtune.pipeline.memory_check.find", lambda name: small)
    result = run("recipe", "check", recipe, "--json")
    assert result.exit_code == 1, result.output
    assert "the training needs" in json.loads(result.stdout)["problems"][0]


def test_check_notes_an_output_that_holds_something(run: Any, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("x")
    result = run("recipe", "check", recipe, "--json")
    assert result.exit_code == 0
    assert "already holds" in json.loads(result.stdout)["notes"][0]


@pytest.mark.parametrize("name", shipped())
def test_init_writes_every_key_and_changes_none(run: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / "recipe.yaml"
    assert run("recipe", "init", path, "--for", name).exit_code == 0
    assert path.read_text() == commented(name)
    plain = Recipe.of(yaml.safe_load(text_of(name)))
    assert Recipe.read(path) == plain
    path.write_text(re.sub(r"^( +)#(\w+:|  |- )", r"\1\2", path.read_text(), flags=re.MULTILINE))
    filled = yaml.safe_load(path.read_text())
    assert Recipe.read(path) == plain
    for section, kind in Recipe.sections().items():
        if section in filled:
            assert set(filled[section]) == set(kind.__dataclass_fields__), section


def test_init_keeps_what_is_there_and_names_the_nearest(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("mine")
    refused(run("recipe", "init", path), "exists", "--overwrite")
    refused(run("recipe", "init", tmp_path), "is a folder")
    refused(run("recipe", "init", tmp_path / "new.yaml", "--for", "qlra"), "did you mean 'qlora'?")
    assert path.read_text() == "mine"
    assert run("recipe", "init", path, "--overwrite").exit_code == 0
    assert path.read_text() == commented("chat")


def test_list_and_show(run: Any) -> None:
    known = json.loads(run("recipe", "list", "--json").stdout)
    assert known == shipped()
    assert all(summary.endswith(".") for summary in known.values())
    listed = run("recipe", "list").stdout
    for name in known:
        assert name in listed
        assert run("recipe", "show", name).stdout == text_of(name)
    assert run("recipe", "show", "chat", "--full").stdout == commented("chat")
    refused(run("recipe", "show", "qlra"), "did you mean 'qlora'?")


CLASSIFIERS = ("classification", "compare-classification")
OF_OTHER_ROWS = {*CLASSIFIERS, "continued-pretraining", "token-classification", "seq2seq", "dpo", "grpo"}
STEP = ["training.max_steps=1", "training.epochs=1", "data.max_length=256", "training.batch_size=2"]


@pytest.mark.parametrize("name", sorted(set(shipped()) - OF_OTHER_ROWS))
def test_each_shipped_recipe_runs_a_step(run: Any, base: Path, data: Path, tmp_path: Path, name: str) -> None:
    overrides = [f"model.name={base}", f"data.train={data}", "data.held_out=0.1", *STEP]
    # Paged states need a GPU; the same optimizer without paging runs here.
    overrides += ["training.optim=adamw_8bit"] if name == "qlora" else []
    trained(run, name, overrides, tmp_path)


def trained(run: Any, name: str, overrides: list[str], tmp_path: Path) -> None:
    assert run("recipe", "init", tmp_path / "recipe.yaml", "--for", name).exit_code == 0
    result = run("train", tmp_path / "recipe.yaml", *overrides, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 1
    assert (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_recipe_of_a_classifier_runs_a_step(run: Any, tmp_path: Path, name: str) -> None:
    from small_encoder import reviews, save_encoder

    rows = write_lines(tmp_path / "rows.jsonl", *reviews(20))
    overrides = [f"model.name={save_encoder(tmp_path / 'encoder')}", f"data.train={rows}", "data.held_out=0.1", *STEP]
    trained(run, name, overrides, tmp_path)


def test_the_recipe_for_plain_texts_runs_a_step(run: Any, base: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(3):
        (texts / f"{number}.txt").write_text(f"one order of tea number {number}, and a large latte for me. " * 30)
    overrides = [f"model.name={base}", f"data.train={texts}", "data.held_out=0", "method.r=4", *STEP]
    trained(run, "continued-pretraining", overrides, tmp_path)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["examples"] > 3


def rows_of(task: str) -> list[dict[str, Any]]:
    """Rows as small as they can be."""
    if task == "token-classification":
        return [{"tokens": ["the", "film", "was", "good"], "tags": ["O", "B-X", "O", "O"]}] * 8
    both = {"prompt": "one tea", "completion": "yes", "chosen": "one tea, gladly", "rejected": "no", "answer": "yes"}
    names = {"seq2seq": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected"), "grpo": ("prompt", "answer")}
    return [{name: f"{both[name]} {number}" for name in names[task]} for number in range(24)]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["token-classification", "seq2seq", "dpo", "grpo"])
def test_the_recipes_of_other_tasks_run_a_step(run: Any, base: Path, tmp_path: Path, name: str) -> None:
    from small_encoder import save_encoder
    from small_seq2seq import save_seq2seq

    if name in ("token-classification", "seq2seq"):
        base = save_encoder(tmp_path / "m") if name == "token-classification" else save_seq2seq(tmp_path / "m", "t5")
    data = write_lines(tmp_path / "rows.jsonl", *rows_of(name))
    overrides = [f"model.name={base}", f"data.train={data}", *STEP]
    # A step of GRPO holds whole groups of answers.
    overrides += ["training.batch_size=8", "preferences.max_new_tokens=4"] if name == "grpo" else []
    trained(run, name, overrides, tmp_path)


@pytest.mark.parametrize("name", shipped())
def test_the_model_of_a_shipped_recipe_is_packaged_or_on_the_hub(name: str) -> None:
    model = Recipe.of(yaml.safe_load(text_of(name))).model.name
    assert model in PACKAGED or "/" in model
