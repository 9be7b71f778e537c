"""Trained rows of embeddings, alone and beside LoRA, are those of peft: files, outputs, gradients, steps."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import slimtune
from tensors import (
    adapter_gradients,
    adapter_tensors,
    assert_all_near,
    assert_near,
    copies,
    loss_of,
    predict,
    randomize,
    relative_error,
    trainable,
)
from zoo import BERT, GEMMA3, GPT2, LLAMA, T5, TIED_LLAMA, Specimen

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TOKENS = [50, 7, 20, 90, 33, 5]
SPECIMENS = (LLAMA, TIED_LLAMA, GPT2, GEMMA3, T5, BERT)
each_specimen = pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
each_method = pytest.mark.parametrize("method", ["alone", "beside-lora"])


def config(library: ModuleType, method: str, specimen: Specimen) -> Any:
    heads = {"modules_to_save": ["classifier"]} if specimen is BERT else {}
    if method == "alone":
        # peft's method has no field for new heads.
        return library.TrainableTokensConfig(token_indices=TOKENS)
    names = [name for name in specimen.lora["target_modules"] if name != "embed_tokens"]
    fan = {"fan_in_fan_out": True} if specimen is GPT2 else {}
    return library.LoraConfig(r=4, trainable_token_indices=TOKENS, target_modules=names, **fan, **heads)


def tokens_alone(tensors: dict[str, Any]) -> dict[str, Any]:
    """Without the heads, which slimtune trains in any case."""
    return {key: tensor for key, tensor in tensors.items() if "classifier" not in key}


@pytest.fixture
def file(specimen: Specimen, method: str, tmp_path: Path) -> Path:
    model = peft.get_peft_model(specimen.model(), config(peft, method, specimen))
    randomize(peft, model).save_pretrained(tmp_path)
    return tmp_path


def load(library: ModuleType, specimen: Specimen, folder: Path) -> nn.Module:
    return library.PeftModel.from_pretrained(specimen.model(), folder, is_trainable=True)


@each_method
@each_specimen
def test_slimtune_reads_what_peft_writes(specimen: Specimen, file: Path) -> None:
    ours, theirs = load(slimtune, specimen, file), load(peft, specimen, file)
    expected = predict(theirs, specimen.batch())
    assert_near(predict(ours, specimen.batch()), expected)
    assert relative_error(expected, predict(specimen.model(), specimen.batch())) > 1e-4
    merged = ours.merge_and_unload()
    assert_near(predict(merged, specimen.batch()), expected)


@each_method
@each_specimen
def test_peft_reads_what_slimtune_writes(specimen: Specimen, method: str, tmp_path: Path) -> None:
    ours = randomize(slimtune, slimtune.get_peft_model(specimen.model(), config(slimtune, method, specimen)))
    ours.save_pretrained(tmp_path / "ours")
    theirs = load(peft, specimen, tmp_path / "ours")
    if not (specimen is BERT and method == "alone"):
        assert_near(predict(ours, specimen.batch()), predict(theirs, specimen.batch()))
    peft.get_peft_model(specimen.model(), config(peft, method, specimen)).save_pretrained(tmp_path / "theirs")
    shapes = [
        {key: (tensor.shape, tensor.dtype) for key, tensor in tokens_alone(load_file(path)).items()}
        for path in sorted(tmp_path.glob("*/adapter_model.safetensors"))
    ]
    assert shapes[0] == shapes[1]


@each_method
@each_specimen
def test_gradients_and_three_steps_agree(specimen: Specimen, file: Path) -> None:
    found = []
    for library in (slimtune, peft):
        model = load(library, specimen, file).double().train()
        if specimen is BERT:
            model.get_submodule("classifier" if library is slimtune else "base_model.model.classifier").requires_grad_(
                False
            )
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
        gradients: dict[str, Any] = {}
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, specimen.batch()).backward()
            gradients = gradients or copies(tokens_alone(adapter_gradients(library, model)))
            optimizer.step()
        found.append((gradients, copies(tokens_alone(adapter_tensors(library, model)))))
    (our_gradients, ours), (their_gradients, theirs) = found
    assert any("trainable_tokens" in key for key in their_gradients)
    assert_all_near(our_gradients, their_gradients)
    assert_all_near(ours, theirs, 1e-6)


def test_generation_agrees_token_by_token(tmp_path: Path) -> None:
    specimen = TIED_LLAMA
    model = peft.get_peft_model(specimen.model(), config(peft, "alone", specimen))
    randomize(peft, model).save_pretrained(tmp_path)
    ids = specimen.batch()["input_ids"]
    ours, theirs = (
        load(library, specimen, tmp_path).eval().generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        for library in (slimtune, peft)
    )
    assert torch.equal(ours, theirs)
    assert set(ours[:, 7:].flatten().tolist()) & set(TOKENS)


@pytest.mark.parametrize("same", [True, False])
def test_rows_named_for_each_end_of_tied_weights(same: bool, tmp_path: Path) -> None:
    """The same tokens at both ends are one set of rows; different ones are two."""
    tokens = {"embed_tokens": TOKENS, "lm_head": TOKENS if same else [8, 9]}
    options = {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": tokens}
    theirs = randomize(peft, peft.get_peft_model(TIED_LLAMA.model(), peft.LoraConfig(**options)))
    theirs.save_pretrained(tmp_path)
    ours = load(slimtune, TIED_LLAMA, tmp_path)
    assert sorted(adapter_tensors(slimtune, ours)) == sorted(adapter_tensors(peft, theirs))
    assert_near(predict(ours, TIED_LLAMA.batch()), predict(theirs, TIED_LLAMA.batch()))
