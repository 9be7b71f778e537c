"""What the card of an adapter says of its base and its format."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from slimtune.storage.model_card import write_model_card


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("gpt2", True),
        ("/models/base", False),
        ("..\\base", False),
        ("a`\n# Buy here\n<script>alert(1)</script>", False),
        ("[a](javascript:alert(1))", False),
        (None, False),
    ],
)
def test_a_base_is_named_where_it_can_be_one_of_the_hub(base: str | None, named: bool, tmp_path: Path) -> None:
    write_model_card(tmp_path, base, ["LORA"], "CAUSAL_LM", in_peft=True)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == (base if named else None)
    assert (f"base_model:adapter:{base}" in card.data.tags) == named
    assert base is None or (f"`{base}`" in card.text) == named


def test_a_folder_of_that_name_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    write_model_card(tmp_path, "models/base", ["LORA"], None, in_peft=True)
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


@pytest.mark.parametrize("in_peft", [True, False])
def test_peft_is_named_where_it_reads_the_file(in_peft: bool, tmp_path: Path) -> None:
    write_model_card(tmp_path, "gpt2", ["LORA" if in_peft else "BOTTLENECK"], None, in_peft)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == ("peft" if in_peft else "slimtune")
    assert ("peft" in card.text) == in_peft
