"""A processor that only emulates 16 bits is told of before hours are spent."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from rich.console import Console

import slimtune
from slimtune import LoraConfig, get_peft_model
from slimtune.data.tasks.registry import read
from slimtune.errors import DoesNotFitError
from slimtune.models.device import is_emulated
from slimtune.pipeline import memory_check, train
from slimtune.pipeline.dtype import in_computing_dtype
from slimtune.plan.devices import find
from slimtune.recipe.recipe import Recipe
from small_text_model import orders, tiny_model, tiny_tokenizer, write_lines

EMULATED = pytest.mark.skipif(not is_emulated("bfloat16", "cpu"), reason="this processor computes in bfloat16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_base_in_16_bits_is_slow_where_they_are_emulated(dtype: torch.dtype) -> None:
    file, model = io.StringIO(), cast(Any, tiny_model()).to(dtype)
    train.show_trained(Console(file=file, width=200), get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")))
    shown = file.getvalue()
    is_told = is_emulated(str(dtype).removeprefix("torch."), "cpu")
    assert "trained in float32" in shown
    assert ("model.dtype=float32" in shown) == is_told


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Of a training on a base of 32 million parameters in bf16, of which nothing but the shape is there."""
    folder = tmp_path_factory.mktemp("large")
    config = tiny_model().config
    config.hidden_size, config.vocab_size, config.dtype = 512, 60_000, torch.bfloat16
    config.head_dim, config.num_hidden_layers = None, 1
    config.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    data = write_lines(folder / "train.jsonl", *({"messages": e.messages()} for e in orders(4)))
    sections = {"model": {"name": str(folder / "base"), "device": "cpu"}, "data": {"train": str(data)}}
    return Recipe.of(sections | {"output": str(folder / "out"), "training": {"batch_size": 1}})


def needed(recipe: Recipe, dtype: str) -> int:
    base = replace(recipe.model, dtype=dtype)
    sections = base, recipe.method, recipe.data, recipe.training, recipe.preferences
    plan, device = memory_check.plan_training(*sections, read(recipe.data), always=True)
    assert plan is not None
    return device.needed_bytes(plan.peak_bytes)


@EMULATED
def test_what_fits_in_16_bits_alone_is_said(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    base, why = in_computing_dtype(recipe.model, recipe.method)
    assert (base.dtype, why) == ("float32", "float32, for this processor only emulates bfloat16")
    large, small = needed(recipe, "float32"), needed(recipe, "bfloat16")
    assert small < 0.95 * large
    tight = replace(find("cpu"), memory_bytes=(large + small) // 2)
    monkeypatch.setattr(memory_check, "find", lambda name: tight)
    # Which other settings would fit takes a dozen simulations, and has tests of its own.
    monkeypatch.setattr(memory_check, "_nearest", lambda *arguments: None)
    sections, rows = (recipe.method, recipe.data, recipe.training, recipe.preferences), read(recipe.data)
    with pytest.raises(DoesNotFitError, match=r"model.dtype=bfloat16 needs [\d.]+ GB, but takes several times as long"):
        memory_check.plan_training(base, *sections, rows)
    kept = replace(recipe.model, dtype="bfloat16")
    assert memory_check.plan_training(kept, *sections, rows, always=True)[0] is not None
    report = slimtune.plan(
        recipe.model.name, recipe.data.train[0].path, tight, methods=["lora"], bases=["dense"],
        memory_gb=tight.memory_bytes / 1e9,
    )  # fmt: skip
    assert report.best is None
    assert report.in_16_bits is not None
