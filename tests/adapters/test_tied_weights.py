"""Input and output embeddings that are one tensor: adapting one changes one, and a merge survives the reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import slimtune
from tensors import assert_near, predict, randomize
from zoo import T5, TIED_LLAMA, Specimen

TARGETS = {
    "head": ["lm_head"],
    "embedding": ["embed_tokens"],
    "head-and-blocks": ["lm_head", "q_proj"],
    "embedding-and-blocks": ["embed_tokens", "up_proj"],
    "both": ["lm_head", "embed_tokens"],
    "neither": ["q_proj"],
}
each_target = pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)


def tuned(targets: list[str], specimen: Specimen = TIED_LLAMA, **options: Any) -> Any:
    config = slimtune.LoraConfig(r=4, target_modules=targets, **options)
    return randomize(slimtune, slimtune.get_peft_model(specimen.model(), config)).eval()


def is_tied(model: Any) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@each_target
def test_a_merge_says_what_the_adapter_said(targets: list[str]) -> None:
    model = tuned(targets)
    unmerged = predict(model, TIED_LLAMA.batch())
    model.merge_adapter()
    assert_near(predict(model, TIED_LLAMA.batch()), unmerged)
    model.unmerge_adapter()
    assert is_tied(model)
    assert torch.equal(predict(model, TIED_LLAMA.batch()), unmerged)
    assert_near(predict(model.merge_and_unload(), TIED_LLAMA.batch()), unmerged)


@each_target
def test_a_merged_model_reloads_to_the_same_answers(targets: list[str], tmp_path: Path) -> None:
    model = tuned(targets)
    unmerged = predict(model, TIED_LLAMA.batch())
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    reread = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_near(predict(reread, TIED_LLAMA.batch()), unmerged)
    untied = targets != TARGETS["neither"]
    assert reread.config.tie_word_embeddings is not untied
    assert is_tied(reread) is not untied


@each_target
def test_the_config_of_other_models_is_not_touched(targets: list[str]) -> None:
    before = TIED_LLAMA.model()
    tuned(targets).merge_and_unload()
    after = TIED_LLAMA.model()
    assert after.config.tie_word_embeddings is True
    assert is_tied(after)
    assert is_tied(before)
    assert type(after)._tied_weights_keys == type(before)._tied_weights_keys


def test_adapting_the_head_leaves_the_embedding_alone() -> None:
    model = tuned(["lm_head"])
    ids = TIED_LLAMA.batch()["input_ids"]
    expected = TIED_LLAMA.model().get_input_embeddings()(ids)
    assert torch.equal(model.get_input_embeddings()(ids), expected)
    merged = model.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings()(ids), expected)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_one_end_trained_whole_reloads_to_the_same_answers(name: str, tmp_path: Path) -> None:
    model = tuned(["q_proj"], modules_to_save=[name])
    unmerged = predict(model, TIED_LLAMA.batch())
    model.save_pretrained(tmp_path / "adapter")
    reread = slimtune.PeftModel.from_pretrained(TIED_LLAMA.model(), tmp_path / "adapter")
    assert torch.equal(predict(reread, TIED_LLAMA.batch()), unmerged)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_near(predict(merged, TIED_LLAMA.batch()), unmerged)


def test_two_embeddings_of_one_tensor_have_a_delta_each(tmp_path: Path) -> None:
    """T5's encoder and decoder look up in one tensor, and its head reads the same one."""
    model = tuned(["embed_tokens"], T5)
    deltas = {name.partition(".deltas.")[0] for name, _ in model.named_parameters() if ".deltas." in name}
    assert deltas == {"encoder.embed_tokens", "decoder.embed_tokens"}
    unmerged = predict(model, T5.batch())
    assert (unmerged - predict(T5.model(), T5.batch())).abs().max() > 1e-3
    merged = model.merge_and_unload()
    assert_near(predict(merged, T5.batch()), unmerged)
    merged.save_pretrained(tmp_path)
    assert_near(predict(transformers.T5ForConditionalGeneration.from_pretrained(tmp_path), T5.batch()), unmerged)


def test_unloading_ties_again() -> None:
    model = tuned(["lm_head", "embed_tokens"])
    released = model.unload()
    assert is_tied(released)
    assert isinstance(released.lm_head, nn.Linear)
    assert torch.equal(predict(released, TIED_LLAMA.batch()), predict(TIED_LLAMA.model(), TIED_LLAMA.batch()))
