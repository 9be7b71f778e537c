"""Last-layer tuning trains the output layer and nothing before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import slimtune
from slimtune.errors import TargetError
from tensors import adapter_tensors, assert_near, copies, loss_of, predict, randomize, trainable
from zoo import BERT, GPT2, LLAMA, MIXTURE, T5, TIED_LLAMA, VIT, Specimen

HEADS: dict[str, tuple[Specimen, set[str]]] = {
    "bert": (BERT, {"classifier.weight", "classifier.bias"}),
    "vit": (VIT, {"classifier.weight", "classifier.bias"}),
    "llama": (LLAMA, {"lm_head.weight"}),
    "tied-llama": (TIED_LLAMA, {"lm_head.weight"}),
    "t5": (T5, {"lm_head.weight"}),
}
LANGUAGE_MODELS = (TIED_LLAMA, GPT2, T5)
each_language_model = pytest.mark.parametrize("specimen", LANGUAGE_MODELS, ids=lambda specimen: specimen.name)


def tuned(specimen: Specimen) -> Any:
    return randomize(slimtune, slimtune.get_peft_model(specimen.model(), slimtune.LastLayerConfig())).eval()


@pytest.mark.parametrize("case", HEADS)
def test_the_output_layer_alone_is_trained_and_stored(case: str) -> None:
    specimen, names = HEADS[case]
    assert adapter_tensors(slimtune, tuned(specimen)).keys() == {f"base_model.model.{name}" for name in names}


@pytest.mark.parametrize("specimen", [BERT, VIT], ids=lambda specimen: specimen.name)
def test_gradients_are_those_of_a_linear_classifier_on_frozen_features(specimen: Specimen) -> None:
    model, batch = tuned(specimen).double(), specimen.batch()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    features: list[torch.Tensor] = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].detach()))
    loss_of(model, batch).backward()
    head = model.classifier.deltas["default"].whole
    weight, bias = (head[name].detach().clone().requires_grad_() for name in ("weight", "bias"))
    F.cross_entropy(F.linear(features[0], weight, bias), batch["labels"]).backward()
    assert_near(head["weight"].grad, weight.grad, 1e-10)
    assert_near(head["bias"].grad, bias.grad, 1e-10)


def test_backward_ends_at_the_last_hidden_state() -> None:
    model = tuned(BERT).train()
    seen: list[bool] = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    loss_of(model, BERT.batch()).backward()
    assert seen == [False]


@each_language_model
def test_a_tied_output_embedding_is_untied_by_its_copy(specimen: Specimen, tmp_path: Path) -> None:
    before = copies(dict(specimen.model().named_parameters()))
    model = tuned(specimen)
    expected = predict(model, specimen.batch())
    model.save_pretrained(tmp_path / "adapter")
    reread = slimtune.PeftModel.from_pretrained(specimen.model(), tmp_path / "adapter")
    assert torch.equal(predict(reread, specimen.batch()), expected)
    merged = reread.merge_and_unload()
    assert_near(predict(merged, specimen.batch()), expected)
    after = copies(dict(merged.named_parameters()))
    assert {name for name in before if torch.equal(before[name], after[name])} == set(before)
    assert not torch.equal(merged.get_output_embeddings().weight, merged.get_input_embeddings().weight)


@each_language_model
def test_an_untied_model_reloads_to_the_same_answers(specimen: Specimen, tmp_path: Path) -> None:
    model = tuned(specimen)
    expected = predict(model, specimen.batch())
    model.merge_and_unload().save_pretrained(tmp_path)
    reread = type(specimen.model()).from_pretrained(tmp_path)
    assert_near(predict(reread, specimen.batch()), expected)
    # T5's encoder and decoder go on sharing an embedding.
    assert reread.config.tie_word_embeddings is (specimen is T5)


def test_unloading_ties_again() -> None:
    released = tuned(TIED_LLAMA).unload()
    assert released.get_output_embeddings().weight is released.get_input_embeddings().weight


def test_a_model_without_a_known_output_names_its_last_layer() -> None:
    with pytest.raises(TargetError, match="name the last layers in target_modules"):
        slimtune.get_peft_model(MIXTURE.model(), slimtune.LastLayerConfig())
    model = slimtune.get_peft_model(MIXTURE.model(), slimtune.LastLayerConfig(target_modules=["out"]))
    assert list(trainable(model)) == ["out.deltas.default.whole.weight"]


def test_a_module_without_parameters_is_refused() -> None:
    with pytest.raises(TargetError, match="modules with parameters"):
        slimtune.get_peft_model(LLAMA.model(), slimtune.LastLayerConfig(target_modules=["act_fn"]))
