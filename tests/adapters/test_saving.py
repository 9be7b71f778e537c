"""Saving and loading is the identity: same config, same tensors, same output, to the bit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import slimtune
from kinds import Kind, cases
from slimtune.core.config import PeftConfig
from tensors import adapter_tensors, assert_same, copies, loss_of, predict, randomize, trainable
from zoo import BERT, LLAMA, SPECIMENS, Specimen

Case = tuple[Kind, PeftConfig]
WEIGHTS = "adapter_model.safetensors"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@given(cases(), st.sampled_from(DTYPES), st.booleans())
def test_save_then_load_is_the_identity(case: Case, dtype: torch.dtype, autocast_adapter_dtype: bool) -> None:
    kind, config = case
    host = kind.host().to(dtype)
    model = slimtune.get_peft_model(host, config, autocast_adapter_dtype=autocast_adapter_dtype)
    randomize(slimtune, model).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reread = slimtune.PeftModel.from_pretrained(
            kind.host().to(dtype), folder, is_trainable=True, autocast_adapter_dtype=autocast_adapter_dtype
        ).eval()
    before, after = adapter_tensors(slimtune, model), adapter_tensors(slimtune, reread)
    assert {key: t.dtype for key, t in after.items()} == {key: t.dtype for key, t in before.items()}
    assert_same(after, before)
    x = kind.input()
    x = x.to(dtype) if x.is_floating_point() else x
    assert torch.equal(reread(x), model(x))
    saved, read = config.to_dict(), reread.peft_config["default"].to_dict()
    changed = {"inference_mode", "auto_mapping", "fan_in_fan_out"}  # written as peft writes them
    assert {k: v for k, v in read.items() if k not in changed} == {k: v for k, v in saved.items() if k not in changed}


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
def test_a_second_save_writes_the_same(specimen: Specimen, tmp_path: Path) -> None:
    model = slimtune.get_peft_model(specimen.model(), slimtune.LoraConfig(r=4, **specimen.options()))
    randomize(slimtune, model).save_pretrained(tmp_path / "first")
    reread = slimtune.PeftModel.from_pretrained(specimen.model(), tmp_path / "first")
    reread.save_pretrained(tmp_path / "second")
    first, second = tmp_path / "first", tmp_path / "second"
    assert (first / "adapter_config.json").read_bytes() == (second / "adapter_config.json").read_bytes()
    assert metadata(first) == metadata(second)
    assert_same(load_file(second / WEIGHTS), load_file(first / WEIGHTS))


def metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return file.metadata()


def test_several_adapters_are_saved_and_loaded_by_name(tmp_path: Path) -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(r=4, **LLAMA.options()))
    model.add_adapter("other", slimtune.LoraConfig(r=2, target_modules=["up_proj"]))
    for seed, name in enumerate(("default", "other")):
        randomize(slimtune, model, name, seed)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()
    reread = slimtune.PeftModel.from_pretrained(LLAMA.model(), tmp_path)
    reread.load_adapter(tmp_path / "other", adapter_name="other")
    for name in ("default", "other"):
        assert_same(adapter_tensors(slimtune, reread, name), adapter_tensors(slimtune, model, name))
        model.set_adapter(name)
        reread.set_adapter(name)
        assert torch.equal(predict(reread, LLAMA.batch()), predict(model, LLAMA.batch()))


def test_selected_adapters_alone_are_saved(tmp_path: Path) -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(r=4, **LLAMA.options()))
    model.add_adapter("other", slimtune.LoraConfig(r=2, **LLAMA.options()))
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert {path.name for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".json")} == set()
    assert (tmp_path / "other" / "adapter_config.json").is_file()


def test_the_file_holds_the_adapter_and_nothing_of_the_base(tmp_path: Path) -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(r=4, **LLAMA.options()))
    model.save_pretrained(tmp_path)
    trained = sum(p.numel() for p in trainable(model).values()) * 4
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert trained <= size < trained + 8192


@pytest.mark.parametrize("is_trainable", [True, False])
def test_a_loaded_adapter_trains_only_when_asked_to(is_trainable: bool, tmp_path: Path) -> None:
    config = slimtune.LoraConfig(r=4, **LLAMA.options())
    slimtune.get_peft_model(LLAMA.model(), config).save_pretrained(tmp_path)
    model = slimtune.PeftModel.from_pretrained(LLAMA.model(), tmp_path, is_trainable=is_trainable)
    assert bool(trainable(model)) is is_trainable
    assert model.peft_config["default"].inference_mode is not is_trainable


@pytest.mark.parametrize("options", [{}, {"modules_to_save": None}, {"task_type": None, "modules_to_save": None}])
def test_a_new_classification_head_is_trained_and_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    """Whether it was named or not: a head that was drawn at random must never be drawn anew on loading."""
    model = slimtune.get_peft_model(BERT.model(), slimtune.LoraConfig(r=4, **BERT.options(**options)))
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.5)
    before = copies(adapter_tensors(slimtune, model))
    loss_of(model.train(), BERT.batch()).backward()
    optimizer.step()
    heads = [key for key in before if "classifier" in key]
    after = adapter_tensors(slimtune, model)
    assert len(heads) == 2
    assert not any(torch.equal(before[key], after[key]) for key in heads)

    model.save_pretrained(tmp_path)
    fresh = BERT.model()
    torch.nn.init.normal_(fresh.classifier.weight)  # the head of another draw
    reread = slimtune.PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(predict(reread, BERT.batch()), predict(model, BERT.batch()))
