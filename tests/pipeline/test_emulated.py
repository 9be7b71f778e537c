"""A processor that only emulates 16 bits is told of before hours are spent."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from slimtune import LoraConfig, get_peft_model
from slimtune.pipeline import train
from small_text_model import tiny_model


@pytest.mark.parametrize(
    ("dtype", "native", "is_told"),
    [
        (torch.bfloat16, "float32", True),
        (torch.float16, "float32", True),
        (torch.bfloat16, "bfloat16", False),
        (torch.float32, "float32", False),
    ],
)
def test_a_base_in_16_bits_is_slow_where_they_are_emulated(
    dtype: torch.dtype, native: str, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "native_dtype", lambda: native)
    screen = Console(file=io.StringIO(), width=200)
    train.show_trained(screen, get_peft_model(tiny_model().to(dtype), LoraConfig(task_type="CAUSAL_LM")))
    shown = screen.file.getvalue()
    assert "trained in float32" in shown
    assert ("model.dtype=float32" in shown) == is_told
