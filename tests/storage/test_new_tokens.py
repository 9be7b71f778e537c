"""Tokens that were added to a base: their rows are stored, and a base without them is told how to get them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import slimtune
from slimtune.errors import BaseMismatchError, ConfigError
from tensors import assert_near, predict, randomize
from zoo import LLAMA, TIED_LLAMA, VOCABULARY, Specimen

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NEW = [VOCABULARY, VOCABULARY + 1]
BATCH = {"input_ids": torch.tensor([[5, NEW[0], 7, NEW[1]], [NEW[1], 9, 8, 6]])}
each_base = pytest.mark.parametrize("specimen", [LLAMA, TIED_LLAMA], ids=lambda specimen: specimen.name)


def enlarged(specimen: Specimen, seed: int) -> Any:
    """The base with two more tokens, whose rows are drawn anew each time."""
    model: Any = specimen.model()
    torch.manual_seed(seed)
    model.resize_token_embeddings(VOCABULARY + len(NEW), mean_resizing=False)
    return model


@each_base
@pytest.mark.parametrize("method", ["alone", "beside-lora"])
def test_rows_of_new_tokens_are_stored(specimen: Specimen, method: str, tmp_path: Path) -> None:
    rows = {"embed_tokens": NEW, "lm_head": NEW}
    config = (
        slimtune.TrainableTokensConfig(token_indices=NEW, target_modules=["embed_tokens", "lm_head"])
        if method == "alone"
        else slimtune.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=rows)
    )
    model = randomize(slimtune, slimtune.get_peft_model(enlarged(specimen, 1), config))
    model.save_pretrained(tmp_path)
    assert sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values()) < 2000
    reread = slimtune.PeftModel.from_pretrained(enlarged(specimen, 2), tmp_path)
    assert_near(predict(reread, BATCH), predict(model, BATCH))
    with pytest.raises(ConfigError, match=rf"resize_token_embeddings\({VOCABULARY + 2}\)"):
        slimtune.PeftModel.from_pretrained(specimen.model(), tmp_path)


@each_base
@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["lm_head"]}]
)
def test_a_base_without_the_tokens_is_told_to_be_resized(
    specimen: Specimen, options: dict[str, Any], tmp_path: Path
) -> None:
    config = slimtune.LoraConfig(r=2, target_modules=["q_proj"], **options)
    slimtune.get_peft_model(enlarged(specimen, 1), config).save_pretrained(tmp_path)
    base = specimen.model()
    before = predict(base, LLAMA.batch())
    with pytest.raises(BaseMismatchError, match=rf"resize_token_embeddings\({VOCABULARY + 2}\) before loading"):
        slimtune.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(predict(base, LLAMA.batch()), before)


def test_lora_on_a_resized_embedding_tells_the_same(tmp_path: Path) -> None:
    config = slimtune.LoraConfig(r=2, target_modules=["embed_tokens"])
    slimtune.get_peft_model(enlarged(LLAMA, 1), config).save_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError, match="resize_token_embeddings"):
        slimtune.PeftModel.from_pretrained(LLAMA.model(), tmp_path)


@each_base
def test_embeddings_that_peft_adds_to_a_file_are_read(specimen: Specimen, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    theirs = randomize(peft, peft.get_peft_model(enlarged(specimen, 1), config))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    ours = slimtune.PeftModel.from_pretrained(enlarged(specimen, 2), tmp_path)
    assert_near(predict(ours, BATCH), predict(theirs, BATCH))
    ours.save_pretrained(tmp_path / "again")
    again = slimtune.PeftModel.from_pretrained(enlarged(specimen, 3), tmp_path / "again")
    assert torch.equal(predict(again, BATCH), predict(ours, BATCH))
