"""Tokens that were added to a base: their rows are stored, and a base without them is told how to get them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

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


# -- A base on disk, tokens added after it was loaded.


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    LLAMA.model().save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def resized(model: Any, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    model.resize_token_embeddings(VOCABULARY + len(NEW), mean_resizing=False)
    return model


def lora(**options: Any) -> slimtune.LoraConfig:
    return slimtune.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("when", ["before", "after"])
def test_resized_embeddings_come_back_with_the_adapter(when: str, base_folder: Path, tmp_path: Path) -> None:
    """Whether the base was resized before or after attaching; by every way to load the adapter again."""
    if when == "before":
        model = slimtune.get_peft_model(resized(loaded(base_folder)), lora())
    else:
        model = resized(slimtune.get_peft_model(loaded(base_folder), lora()))
    randomize(slimtune, model)
    expected, frozen = predict(model, BATCH), {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("deltas" in name for name in frozen)
    folder = tmp_path / "adapter"
    with pytest.warns(UserWarning, match="resized after the base was loaded: .* saved whole"):
        model.save_pretrained(folder)
    assert torch.equal(predict(slimtune.AutoPeftModelForCausalLM.from_pretrained(folder), BATCH), expected)
    assert torch.equal(predict(slimtune.load(str(folder), dtype="float32")[0], BATCH), expected)
    on_resized = slimtune.PeftModel.from_pretrained(resized(loaded(base_folder), seed=9), folder)
    assert torch.equal(predict(on_resized, BATCH), expected)
    with pytest.raises(BaseMismatchError, match=rf"resize_token_embeddings\({VOCABULARY + 2}\) before loading"):
        slimtune.PeftModel.from_pretrained(loaded(base_folder), folder)
    theirs = peft.PeftModel.from_pretrained(resized(loaded(base_folder), seed=9), folder)
    assert_near(predict(theirs, BATCH), expected)
    on_resized.save_pretrained(tmp_path / "again")
    again = slimtune.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(predict(again, BATCH), expected)


def test_untrained_rows_are_told_when_the_adapter_is_attached(base_folder: Path) -> None:
    with pytest.warns(UserWarning, match=f"from {VOCABULARY} to {VOCABULARY + 2} tokens.*trainable_token_indices"):
        slimtune.get_peft_model(resized(loaded(base_folder)), lora())


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": {"embed_tokens": NEW, "lm_head": NEW}},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["rows", "whole"],
)
def test_what_the_adapter_trains_of_them_is_not_stored_twice(
    options: dict[str, Any], base_folder: Path, tmp_path: Path
) -> None:
    model = randomize(slimtune, slimtune.get_peft_model(resized(loaded(base_folder)), lora(**options)))
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "without")]
    assert files[0] == files[1]


def test_save_embedding_layers_means_what_it_means_in_peft(base_folder: Path, tmp_path: Path) -> None:
    ends = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    for is_resized, wish, expected in [
        (False, "auto", set()),
        (False, True, ends),
        (True, "auto", ends),
        (True, False, set()),
    ]:
        names = []
        for library in (slimtune, peft):
            base = resized(loaded(base_folder)) if is_resized else loaded(base_folder)
            config = library.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
            folder = tmp_path / f"{library.__name__}-{is_resized}-{wish}"
            library.get_peft_model(base, config).save_pretrained(folder, save_embedding_layers=wish)
            names.append({name for name in load_file(folder / "adapter_model.safetensors") if "lora" not in name})
        assert names == [expected, expected]
    with pytest.raises(ConfigError, match="True, False or"):
        slimtune.get_peft_model(loaded(base_folder), lora()).save_pretrained(tmp_path, save_embedding_layers="all")


def test_lora_on_the_resized_head_brings_its_matrix(base_folder: Path, tmp_path: Path) -> None:
    config = slimtune.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = randomize(slimtune, slimtune.get_peft_model(resized(loaded(base_folder)), config))
    expected = predict(model, BATCH)
    model.save_pretrained(tmp_path / "adapter")
    assert_near(predict(slimtune.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), BATCH), expected)
    with pytest.raises(BaseMismatchError, match="lm_head"):
        slimtune.PeftModel.from_pretrained(resized(loaded(base_folder), seed=9), tmp_path / "adapter")


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}], ids=str)
def test_what_an_adapter_changes_is_not_resized(options: dict[str, Any], base_folder: Path) -> None:
    model = slimtune.get_peft_model(loaded(base_folder), lora(**options))
    before = predict(model, LLAMA.batch())
    with pytest.raises(ConfigError, match="resize the base before the adapter is attached"):
        model.resize_token_embeddings(VOCABULARY + 2)
    assert torch.equal(predict(model, LLAMA.batch()), before)
