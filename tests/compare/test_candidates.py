"""What can be compared, how it is named, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimtune.compare.task import Task, check_candidates, check_unchanged, recipe_of, write_recipe
from slimtune.errors import ConfigError, OutputExistsError
from slimtune.recipe.candidates import candidates_of, prompted, runs_of, trained
from slimtune.recipe.compare import CompareSettings


def task(folder: Path, **settings: object) -> Task:
    sections = {
        "model": {"name": "smollm2-135m-instruct", "dtype": "float32"},
        "data": {"train": "rows.jsonl", "held_out": 0.2, "max_length": 256},
        "method": {"name": "lora", "r": 4},
        "training": {"batch_size": 4, "epochs": 2},
    }
    return Task(folder, sections, CompareSettings(**settings), folder / "train.jsonl", folder / "questions.jsonl")  # type: ignore[arg-type]


def test_qlora_is_lora_on_nf4() -> None:
    candidate = trained("qlora")
    assert (candidate.method, candidate.quantize, candidate.name) == ("lora", "nf4", "qlora")
    assert "NF4" in candidate.summary


def test_variants_are_arms_of_their_own() -> None:
    candidate = trained("lora:r=64:use_rslora=true")
    assert candidate.fields == (("r", "64"), ("use_rslora", "true"))
    assert candidate.slug == "lora-r-64-use-rslora-true"


def test_the_base_needs_no_seeds_and_prompts_come_first() -> None:
    runs = runs_of(candidates_of(["lora"], [0, 2], random_labels=True), 2)
    assert [str(run) for run in runs] == [
        "base, seed 0", "2-shot, seed 0", "2-shot random labels, seed 0", "lora, seed 0",
        "2-shot, seed 1", "2-shot random labels, seed 1", "lora, seed 1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("methods", "shots", "said"),
    [
        (["lora", "lora"], [], "'lora' is asked for twice"),
        (["lora:r"], [], "pass NAME or NAME:FIELD=VALUE"),
        (["lora:r=1:r=2"], [], "sets r twice"),
        ([], [], "nothing to compare"),
        ([], [-1], "can't hold -1 examples"),
    ],
)
def test_what_can_not_be_compared_is_refused(methods: list[str], shots: list[int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        candidates_of(methods, shots, random_labels=False)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"methodes": ["lora"]}, "did you mean 'methods'"),
        ({"methods": "lora"}, "must be a list of str"),
        ({"seeds": 0}, "at least 1"),
        ({"spectra": "some"}, "must be one of"),
        ({"learning_rates": [1e-3]}, "must map methods to rates"),
        ([], "must hold settings"),
    ],
)
def test_mistakes_in_the_section(values: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CompareSettings.of(values)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"methods": ["lorra"]}, "lorra: no method 'lorra'; did you mean 'lora'"),
        ({"methods": ["lora:rank=8"]}, "lora:rank=8: "),
        ({"methods": ["lora"], "learning_rates": {"lorra": 1e-3}}, "did you mean 'lora'"),
    ],
)
def test_methods_and_fields_are_checked_before_anything_runs(tmp_path: Path, settings: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_candidates(task(tmp_path, **settings))


def test_every_method_of_the_command_can_be_an_arm(tmp_path: Path) -> None:
    check_candidates(task(tmp_path, methods=["full", "lora", "qlora", "dora", "ia3", "bitfit", "prefix-tuning"]))


def test_a_run_has_the_same_recipe_but_for_its_method(tmp_path: Path) -> None:
    of = task(tmp_path, methods=["lora", "qlora", "full", "lora:r=8"], learning_rates={"full": 1e-4}, max_steps=7)
    lora, qlora, full, variant = (recipe_of(of, run) for run in runs_of(of.settings.candidates, 2)[-4:])
    for recipe in (lora, qlora, full, variant):
        assert recipe["data"] == {"max_length": 256, "train": str(of.train), "held_out": 0}
        assert recipe["training"] | {"learning_rate": None} == {
            "batch_size": 4, "epochs": 2, "max_steps": 7, "seed": 1, "learning_rate": None,
        }  # fmt: skip
    assert lora["method"] == qlora["method"] == {"name": "lora", "r": 4}
    assert variant["method"] == {"name": "lora", "r": 8}
    assert full["method"] == {"name": "full"}
    assert (qlora["model"]["quantize"], "quantize" in lora["model"]) == ("nf4", False)
    assert full["training"]["learning_rate"] == 1e-4
    assert "learning_rate" not in lora["training"]


def test_a_rate_of_a_variant_comes_before_that_of_the_section(tmp_path: Path) -> None:
    of = task(tmp_path, methods=["lora:learning_rate=3e-4", "lora:r=8"], shots=(), learning_rates={"lora": 1e-3})
    own, shared = (recipe_of(of, run) for run in runs_of(of.settings.candidates, 1))
    assert own["training"]["learning_rate"] == 3e-4
    assert own["method"] == {"name": "lora", "r": 4}
    assert shared["training"]["learning_rate"] == 1e-3


def test_the_rate_of_the_recipe_is_for_the_kind_of_method_that_it_names(tmp_path: Path) -> None:
    of = task(tmp_path, methods=["lora", "qlora", "dora", "full", "ia3"], shots=())
    of.recipe["training"]["learning_rate"] = 1e-3
    rates = [recipe_of(of, run)["training"].get("learning_rate") for run in runs_of(of.settings.candidates, 1)]
    assert rates == [1e-3, 1e-3, 1e-3, None, None]


def test_a_run_that_was_begun_otherwise_is_refused(tmp_path: Path) -> None:
    before = task(tmp_path, methods=["lora"], shots=(), seeds=1, learning_rates={"lora": 1e-3})
    (run,) = runs_of(before.settings.candidates, 1)
    before.place(run).mkdir(parents=True)
    write_recipe(before, run)
    check_unchanged(before, [run])
    now = task(tmp_path, methods=["lora"], shots=(), seeds=1, learning_rates={"lora": 2e-3})
    with pytest.raises(OutputExistsError, match=r"training.learning_rate was 0.001 and is now 0.002"):
        check_unchanged(now, [run])


def test_the_untuned_model_is_named_by_what_it_is() -> None:
    assert prompted(0).summary == "the model as it comes, without an example"
    assert prompted(1).summary == "the model as it comes, 1 example in the prompt"
    assert prompted(4, True).summary.endswith("dealt at random")
