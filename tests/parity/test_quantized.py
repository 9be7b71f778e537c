"""A step on quantized bases beside peft with bitsandbytes: the same adapters, the same batch, a real model."""

from __future__ import annotations

import copy
import functools
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import slimtune
from quantizers import expanded
from slimtune.bases import claim
from slimtune.bases.bitsandbytes import Linear4bit
from slimtune.models.device import native_dtype
from slimtune.storage.source import resolve
from tensors import adapter_gradients, adapter_tensors, assert_all_near, assert_near, copies, loss_of
from zoo import LLAMA_LINEARS

NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
QUANTIZATIONS: dict[str, dict[str, Any]] = {"nf4": NF4, "int8": {"load_in_8bit": True}}
NOISE = 0.01
"""A gradient that is so much smaller than the largest one is mostly bf16 rounding."""
each_form = pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
Step = tuple[Tensor, dict[str, Tensor]]


@functools.cache
def loaded(quantization: str, dtype: torch.dtype) -> Any:
    settings = QUANTIZATIONS[quantization] | ({"bnb_4bit_compute_dtype": dtype} if quantization == "nf4" else {})
    config = BitsAndBytesConfig(**settings)
    folder = resolve("smollm2-135m-instruct")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map="cpu")


def base(dtype: torch.dtype, quantization: str = "nf4") -> Any:
    """SmolLM2 as a user has it in few bits; never evaluated by bitsandbytes, which would repack its weights."""
    return copy.deepcopy(loaded(quantization, dtype)).train()


@pytest.fixture
def batch(smollm2_tokenizer: Any) -> dict[str, Tensor]:
    texts = ["The capital of France is Paris, and", "A fine-tuned model is one frozen base and a tiny trainable delta."]
    ids = smollm2_tokenizer(texts, return_tensors="pt", padding=True)
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    return {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"], "labels": labels}


def some_tokens(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 1000, (2, 24), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def drawn(tensors: dict[str, Tensor], moved: float) -> dict[str, Tensor]:
    """A as at the start of training, B moved by so much, magnitudes as they are."""
    generator = torch.Generator().manual_seed(1)
    for key in sorted(tensors):
        if "lora_A" in key:
            bound = tensors[key].shape[1] ** -0.5
            tensors[key].uniform_(-bound, bound, generator=generator)
        elif "lora_B" in key:
            tensors[key].normal_(std=moved, generator=generator)
    return tensors


def step(library: ModuleType, model: Any, batch: dict[str, Tensor], moved: float, **options: Any) -> Step:
    """Loss and gradients of one step."""
    config = library.LoraConfig(r=8, lora_alpha=16, target_modules=LLAMA_LINEARS, task_type="CAUSAL_LM", **options)
    model = library.get_peft_model(model, config)
    with torch.no_grad():
        adapter = drawn(copies(adapter_tensors(library, model)), moved)
    library.set_peft_model_state_dict(model, adapter)
    loss = loss_of(model.train(), batch)
    loss.backward()
    return loss.detach().float(), copies(adapter_gradients(library, model))


def cosine(ours: Tensor, theirs: Tensor) -> float:
    return float(torch.cosine_similarity(ours.double().flatten(), theirs.double().flatten(), dim=0))


def whole(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[key].flatten() for key in sorted(gradients)])


@pytest.mark.slow
def test_the_first_step_on_nf4_in_bf16_is_peft_s(batch: dict[str, Tensor]) -> None:
    ours, theirs = (step(library, base(torch.bfloat16), batch, 0.0) for library in (slimtune, peft))
    # DoRA starts at the base too; peft's rounds its way to another loss, 5e-3 apart.
    assert torch.equal(step(slimtune, base(torch.bfloat16), batch, 0.0, use_dora=True)[0], ours[0])
    assert_near(ours[0], theirs[0], 1e-3)
    assert sorted(ours[1]) == sorted(theirs[1])
    assert cosine(whole(ours[1]), whole(theirs[1])) > 0.999
    largest = max(float(gradient.norm()) for gradient in theirs[1].values())
    loud = [key for key, gradient in theirs[1].items() if gradient.norm() > NOISE * largest]
    assert len(loud) > 100
    assert min(cosine(ours[1][key], theirs[1][key]) for key in loud) > 0.99


@pytest.mark.skipif(native_dtype() != "bfloat16", reason="emulated bfloat16 rounds between its products otherwise")
@each_form
def test_a_later_step_in_bf16_is_as_near_to_float32_as_peft_s(
    options: dict[str, Any], batch: dict[str, Tensor]
) -> None:
    """Two sums of bf16 products that are rounded in other places differ by the sum of their errors.

    Over several batches: which of two roundings a single one likes better is chance.
    """
    errors = []
    for one in (batch, *(some_tokens(seed) for seed in range(4))):
        exact = whole(step(slimtune, base(torch.float32), one, 0.02, **options)[1])
        found = [step(library, base(torch.bfloat16), one, 0.02, **options) for library in (slimtune, peft)]
        assert_near(found[0][0], found[1][0], 5e-3)
        errors.append([1 - cosine(whole(gradients), exact) for _, gradients in found])
    ours, theirs = (sum(column) for column in zip(*errors, strict=True))
    assert ours < 1.25 * theirs


@each_form
def test_a_later_step_in_float32_is_peft_s_and_that_on_the_expanded_weights(
    options: dict[str, Any], batch: dict[str, Tensor]
) -> None:
    dense = base(torch.float32)
    claim(dense)
    for path, layer in list(dense.named_modules()):
        if isinstance(layer, Linear4bit):
            dense.set_submodule(path, expanded(layer))
    found = step(slimtune, base(torch.float32), batch, 0.02, **options)
    for other in (
        step(slimtune, dense, batch, 0.02, **options),
        step(peft, base(torch.float32), batch, 0.02, **options),
    ):
        assert_near(found[0], other[0], 1e-5)
        assert_all_near(found[1], other[1], 1e-3)


@pytest.mark.slow
def test_a_step_on_int8_is_near_to_peft_s(batch: dict[str, Tensor]) -> None:
    """bitsandbytes quantizes the inputs of its int8 products too, row by row; here they stay as they are."""
    ours, theirs = (step(library, base(torch.bfloat16, "int8"), batch, 0.0) for library in (slimtune, peft))
    assert_near(ours[0], theirs[0], 0.01)
    assert cosine(whole(ours[1]), whole(theirs[1])) > 0.99
