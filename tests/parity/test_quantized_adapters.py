"""An adapter is for all precisions of its base, here and in peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import slimtune
from few_bits import loaded, wide
from slimtune.bases import claim
from tensors import adapter_tensors, assert_near, assert_same, copies, predict, relative_error
from zoo import LLAMA

pytestmark = pytest.mark.filterwarnings("ignore:.*(quantiz|4-bit|8-bit|Already found|embed)")


def trained(library: Any, base: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Three steps, and the adapter as it was written."""
    torch.manual_seed(0)
    model = library.get_peft_model(base, library.LoraConfig(r=4, lora_alpha=8, **LLAMA.options())).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        model(**LLAMA.batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder, save_embedding_layers=False)
    return copies(adapter_tensors(library, model))


@pytest.mark.parametrize("trainer", [slimtune, peft], ids=["slimtune", "peft"])
@pytest.mark.parametrize("reader", [slimtune, peft], ids=["slimtune", "peft"])
@pytest.mark.parametrize("there", ["nf4", "float32"])
def test_trained_on_one_and_loaded_on_the_other(trainer: Any, reader: Any, there: str, tmp_path: Path) -> None:
    bases = {"nf4": lambda: loaded(wide(), tmp_path / "base"), "float32": wide().model}
    here = "float32" if there == "nf4" else "nf4"
    written = trained(trainer, bases[here](), tmp_path / "adapter")
    # In training mode, because bitsandbytes repacks weights on some CPUs when it evaluates.
    model = reader.PeftModel.from_pretrained(bases[there](), tmp_path / "adapter").train()
    assert_same(adapter_tensors(reader, model), written)
    ours = slimtune.PeftModel.from_pretrained(bases[there](), tmp_path / "adapter")
    batch = {"input_ids": LLAMA.batch()["input_ids"]}
    with torch.no_grad():
        assert_near(model(**batch).logits, predict(ours, batch))
    base: Any = bases[there]()
    claim(base)
    assert relative_error(predict(base, batch), predict(ours, batch)) > 1e-3


def test_merged_into_what_it_was_trained_on_it_is_the_same_and_into_the_original_it_is_not(tmp_path: Path) -> None:
    trained(slimtune, loaded(wide(), tmp_path / "base"), tmp_path / "adapter")
    batch = {"input_ids": LLAMA.batch()["input_ids"]}
    apart = slimtune.PeftModel.from_pretrained(loaded(wide(), tmp_path / "base"), tmp_path / "adapter")
    expected = predict(apart, batch)
    assert_near(predict(apart.merge_and_unload(), batch), expected)
    other = slimtune.PeftModel.from_pretrained(wide().model(), tmp_path / "adapter").merge_and_unload()
    assert relative_error(predict(other, batch), expected) > 1e-2
