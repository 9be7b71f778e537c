"""Slimmed models are planned as they are stored: codes and scales of integers, fewer layers of a pruned one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import slimtune
from slimtune.errors import ConfigError
from slimtune.methods.lora.config import LoraConfig
from slimtune.plan.plan import plan
from slimtune.plan.quantize import tensors_of
from slimtune.plan.simulate import simulate
from slimtune.slim.folder import quantize_to_folder
from slimtune.slim.quantize import QuantizeConfig
from small_text_model import save_base

SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16": {"scheme": "W4A16", "method": "rtn", "group_size": 32},
    "W8A16": {"scheme": "W8A16", "method": "rtn"},
    "int4, int8 head": {"scheme": "W4A16", "method": "rtn", "group_size": 32, "head": "int8"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("slimmed")
    base = save_base(root / "base")
    made = {"dense": base}
    for name, options in SCHEMES.items():
        model, tokenizer = slimtune.load(str(base))
        made[name] = root / name.replace(", ", "-").replace(" ", "-")
        quantize_to_folder(model, tokenizer, made[name], QuantizeConfig(**options))
    return made


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_those_that_loading_holds(folders: dict[str, Path], name: str) -> None:
    folder = str(folders[name])
    planned = simulate(folder, LoraConfig(task_type="CAUSAL_LM"), sequence=8, dtype="float32", device="cpu")
    model, _ = slimtune.load(folder, dtype="float32")
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_of(model)}
    assert planned.peak.parts.weights == sum(held.values())
    assert any(note.startswith("the model is stored as W") for note in planned.notes)


def test_a_step_on_it_runs_as_it_is_planned(folders: dict[str, Path]) -> None:
    dense, int4 = (
        simulate(str(folders[name]), LoraConfig(task_type="CAUSAL_LM"), sequence=8, dtype="float32", device="cpu")
        for name in ("dense", "W4A16")
    )
    assert int4.peak.parts.weights < dense.peak.parts.weights
    assert int4.trainable == dense.trainable
    # Expanding moves bytes and multiplies nothing.
    assert int4.work["forward"].flops == dense.work["forward"].flops
    assert int4.work["forward"].bytes_moved > dense.work["forward"].bytes_moved


def test_every_method_is_planned_on_what_is_stored_and_no_other_base(folders: dict[str, Path]) -> None:
    folder = str(folders["W4A16"])
    report = plan(folder, device="T4", max_length=8)
    assert {choice.base for choice in report.choices} == {"dense"}
    assert "full" not in {choice.method for choice in report.choices}
    assert report.best is not None
    assert "--quantize" not in report.command(report.best)
    with pytest.raises(ConfigError, match="stored in few bits already"):
        plan(folder, device="T4", max_length=8, bases=["nf4"])
    with pytest.raises(ConfigError, match="plan its dense form"):
        plan(folder, device="T4", max_length=8, methods=["full"])
