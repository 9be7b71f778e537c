"""Adapters written by slimtune are read by peft and the other way round, and the outputs agree."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import peft
import pytest
from safetensors.torch import load_file
from torch import nn

import slimtune
from tensors import adapter_tensors, assert_near, assert_same, predict, randomize
from zoo import SPECIMENS, Specimen

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
each_specimen = pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)


def attach(library: ModuleType, specimen: Specimen) -> nn.Module:
    config = library.LoraConfig(r=4, lora_alpha=6, **specimen.options())
    return randomize(library, library.get_peft_model(specimen.model(), config))


def save(model: nn.Module, folder: Path) -> dict:
    model.save_pretrained(folder, save_embedding_layers=False)
    return load_file(folder / "adapter_model.safetensors")


@each_specimen
def test_peft_reads_what_slimtune_writes(specimen: Specimen, tmp_path: Path) -> None:
    ours = attach(slimtune, specimen)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(specimen.model(), tmp_path)
    assert_same(adapter_tensors(peft, theirs), adapter_tensors(slimtune, ours))
    assert_near(predict(ours, specimen.batch()), predict(theirs, specimen.batch()))


@each_specimen
def test_slimtune_reads_what_peft_writes(specimen: Specimen, tmp_path: Path) -> None:
    theirs = attach(peft, specimen)
    theirs.save_pretrained(tmp_path)
    ours = slimtune.PeftModel.from_pretrained(specimen.model(), tmp_path)
    assert_same(adapter_tensors(slimtune, ours), adapter_tensors(peft, theirs))
    assert_near(predict(ours, specimen.batch()), predict(theirs, specimen.batch()))


@each_specimen
def test_the_files_hold_the_same_names_shapes_and_types(specimen: Specimen, tmp_path: Path) -> None:
    ours = save(attach(slimtune, specimen), tmp_path / "ours")
    theirs = save(attach(peft, specimen), tmp_path / "theirs")
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in ours.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in theirs.items()
    }


@each_specimen
def test_an_adapter_changes_the_output(specimen: Specimen) -> None:
    """Otherwise the agreement above would be that of two bases."""
    base = predict(specimen.model(), specimen.batch())
    tuned = predict(attach(slimtune, specimen), specimen.batch())
    assert (tuned - base).abs().max() > 1e-2 * base.abs().max()


@each_specimen
def test_trainable_parameters_are_counted_alike(specimen: Specimen, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = attach(slimtune, specimen), attach(peft, specimen)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours.print_trainable_parameters()
    printed_by_us = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert printed_by_us.splitlines()[0] == capsys.readouterr().out.strip()


MERGEABLE = [specimen for specimen in SPECIMENS if specimen.name != "mixture"]  # peft can't merge grouped convolutions


@pytest.mark.parametrize("specimen", MERGEABLE, ids=lambda specimen: specimen.name)
def test_merged_models_agree(specimen: Specimen) -> None:
    ours = attach(slimtune, specimen).merge_and_unload()
    theirs = attach(peft, specimen).merge_and_unload()
    assert_near(predict(ours, specimen.batch()), predict(theirs, specimen.batch()))
    assert_near_weights(ours, theirs)


def assert_near_weights(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    actual = ours.state_dict()
    assert sorted(actual) == sorted(expected)
    for key, tensor in expected.items():
        assert_near(actual[key], tensor, 1e-6, key)
