"""The page on the engine: its code runs as it stands, with adapters that are there."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

import slimtune
from tensors import randomize

PAGE = (Path(__file__).parents[2] / "docs" / "engine.md").read_text()


def test_the_code_runs(
    smollm2_and_tokenizer: tuple[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, tokenizer = smollm2_and_tokenizer
    for name, config in (("support", slimtune.LoraConfig(use_dora=True)), ("orders", slimtune.IA3Config())):
        tuned = randomize(slimtune, slimtune.get_peft_model(copy.deepcopy(model), config))
        tuned.save_pretrained(tmp_path / "adapters" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slimtune, "load", lambda name: (copy.deepcopy(model), tokenizer))
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)), {})
    assert capsys.readouterr().out.count("length") == 3


def test_every_setting_is_named() -> None:
    for name in (*slimtune.SamplingParams.__dataclass_fields__, "slots", "context", "prefill_chunk", "rank_budget"):
        assert f"`{name}`" in PAGE, name
