"""A real model, SmolLM2-135M-Instruct: the same adapter files, outputs, gradients and words as peft."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import slimtune
from tensors import (
    adapter_gradients,
    adapter_tensors,
    assert_all_near,
    assert_near,
    assert_same,
    copies,
    loss_of,
    predict,
    randomize,
)
from zoo import LLAMA_LINEARS

OPTIONS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": LLAMA_LINEARS,
    "task_type": "CAUSAL_LM",
}


@pytest.fixture
def batch(smollm2_tokenizer: Any) -> dict[str, Tensor]:
    texts = ["The capital of France is Paris, and", "A fine-tuned model is one frozen base"]
    ids = smollm2_tokenizer(texts, return_tensors="pt", padding=True)
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    return {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"], "labels": labels}


@pytest.fixture(scope="module")
def file(smollm2: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter of peft, small enough that the model still speaks."""
    folder = tmp_path_factory.mktemp("peft")
    model = randomize(peft, peft.get_peft_model(copy.deepcopy(smollm2), peft.LoraConfig(**OPTIONS)))
    small = {key: 0.1 * tensor for key, tensor in adapter_tensors(peft, model).items()}
    peft.set_peft_model_state_dict(model, small)
    model.save_pretrained(folder)
    return folder


def load(library: ModuleType, base: Any, folder: Path) -> Any:
    return library.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)


def test_the_adapter_of_peft(smollm2: Any, batch: dict[str, Tensor], file: Path, tmp_path: Path) -> None:
    """Outputs, gradients, greedy words, and the file written back."""
    ours, theirs = load(slimtune, smollm2, file), load(peft, smollm2, file)
    assert_near(predict(ours, batch), predict(theirs, batch))

    prompt = {"input_ids": batch["input_ids"][:1, :5], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    words = [model.generate(**prompt, max_new_tokens=8, do_sample=False) for model in (ours, theirs)]
    assert torch.equal(*words)

    losses = []
    for model in (ours, theirs):
        loss = loss_of(model.train(), batch)
        loss.backward()
        losses.append(loss.detach())
    assert_near(*losses)
    assert_all_near(copies(adapter_gradients(slimtune, ours)), copies(adapter_gradients(peft, theirs)))

    ours.save_pretrained(tmp_path)
    reread = load(peft, smollm2, tmp_path)
    assert_same(adapter_tensors(peft, reread), adapter_tensors(peft, theirs))


def test_the_merged_model(smollm2: Any, batch: dict[str, Tensor], file: Path) -> None:
    model = load(slimtune, smollm2, file)
    unmerged = predict(model, batch)
    merged = model.merge_and_unload(safe_merge=True)
    assert_near(predict(merged, batch), unmerged)
    assert (unmerged - predict(smollm2, batch)).abs().max() > 0.1
