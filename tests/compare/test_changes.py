"""What may change in a comparison that goes on, and what a reader is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compare.constructed import LORA, done, failed, run, summary
from slimtune.compare.record import ComparisonRecord, ConstantAnswer
from slimtune.compare.remarks import constant_of, environment_changes, not_above_constant, remarks
from slimtune.compare.results import RESULT
from slimtune.compare.setup import RECIPE, ComparisonSetup, check_unchanged, write_recipe
from slimtune.compare.stages import stages_of
from slimtune.errors import OutputExistsError
from slimtune.recipe.candidates import Run
from slimtune.recipe.compare import CompareSettings
from slimtune.storage.text_files import read_mapping
from small_text_model import write_lines


def task(folder: Path, rate: float = 1e-3, kind: str = "text") -> ComparisonSetup:
    """A comparison of lora, whose learning rate is this."""
    recipe: dict[str, Any] = {"model": {"name": "base"}, "data": {"train": "x"}, "training": {"max_steps": 2}}
    settings = CompareSettings(methods=("lora",), shots=(), seeds=2, learning_rates={"lora": rate})
    return ComparisonSetup(folder, recipe, settings, folder / "train.jsonl", folder / "questions.jsonl", kind)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of a run whose training is done."""
    write_recipe(task(tmp_path), run(LORA))
    place = task(tmp_path).place(run(LORA))
    (place / "train.json").write_text("{}")
    return place


def test_what_was_begun_or_done_stays_as_it_is(tmp_path: Path, begun: Path) -> None:
    check_unchanged(task(tmp_path), [run(LORA)])
    with pytest.raises(OutputExistsError, match=r"training.learning_rate was 0.001 and is now 0.01"):
        check_unchanged(task(tmp_path, 1e-2), [run(LORA)])
    done(LORA, [0.5])[0].write(begun / RESULT)
    with pytest.raises(OutputExistsError, match="was begun with other settings"):
        check_unchanged(task(tmp_path, 1e-2), [run(LORA)])


def test_what_failed_may_change_and_begins_anew(tmp_path: Path, begun: Path) -> None:
    failed(LORA, 0, "evaluate: no memory").write(begun / RESULT)
    write_recipe(task(tmp_path), run(LORA))
    assert (begun / "train.json").exists(), "the same settings again: its training is still good"
    changed = task(tmp_path, 1e-2)
    check_unchanged(changed, [run(LORA)])
    write_recipe(changed, run(LORA))
    assert not (begun / "train.json").exists()
    assert read_mapping(begun / RECIPE)["training"]["learning_rate"] == 1e-2
    assert stages_of(changed, run(LORA))[0].work.keywords["resume"] is False  # type: ignore[attr-defined]


def test_a_seed_that_was_done_holds_the_settings_of_the_others(tmp_path: Path, begun: Path) -> None:
    done(LORA, [0.5])[0].write(begun / RESULT)
    second = Run(LORA, 1)
    write_recipe(task(tmp_path), second)
    failed(LORA, 1).write(task(tmp_path).place(second) / RESULT)
    with pytest.raises(OutputExistsError, match="the run lora, seed 0"):
        check_unchanged(task(tmp_path, 1e-2), [run(LORA), second])


def test_classifiers_have_no_forgetting(tmp_path: Path) -> None:
    assert [stage.name for stage in stages_of(task(tmp_path), run(LORA))][2:] == ["forgetting", "spectra"]
    labelled = stages_of(task(tmp_path, kind="classification"), run(LORA))
    assert [stage.name for stage in labelled] == ["train", "evaluate", "spectra"]


def test_what_one_answer_to_everything_would_score(tmp_path: Path) -> None:
    labels = task(tmp_path, kind="classification")
    write_lines(labels.train, *({"text": "x", "label": label} for label in ("ham", "ham", "spam")))
    write_lines(labels.questions, *({"text": "x", "label": label} for label in ("ham", "ham", "ham", "spam")))
    constant = constant_of(labels)
    assert constant == ConstantAnswer(label="ham", share=0.75)
    assert "Always answering 'ham'" in remarks(labels, True, constant)[0]
    assert not any("can't be prompted" in remark for remark in remarks(labels, True, constant))
    assert any("can't be prompted" in remark for remark in remarks(labels, False, constant))
    assert constant_of(task(tmp_path)) is None


def test_that_nothing_was_learned_is_a_warning() -> None:
    of = summary([(LORA, done(LORA, [0.78, 0.8, 0.79]))])
    (said,) = not_above_constant(of, ConstantAnswer(label="ham", share=0.75))
    assert "Nothing is shown to have been learned" in said
    assert "always answering 'ham' would score (0.750)" in said
    assert not_above_constant(of, ConstantAnswer(label="ham", share=0.5)) == []
    assert not_above_constant(of, None) == []


def test_another_machine_is_told_once() -> None:
    machine, versions = {"processor": "fast", "cores": "8"}, {"torch": "2.13"}
    before = ComparisonRecord(
        model="m", data="d", command="c", date="yesterday", recipe="", candidates=[], seeds=1, same={},
        machine={"processor": "slow", "cores": "8"}, versions={"torch": "2.12"},
    )  # fmt: skip
    (said,) = environment_changes(before, machine, versions)
    assert said.startswith("Until yesterday it was run with processor slow and torch 2.12: memory and time")
    after = before.model_copy(update={"machine": machine, "versions": versions, "moved": [said]})
    assert environment_changes(after, machine, versions) == [said]
