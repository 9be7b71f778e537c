"""Started from the same adapter file, slimtune and peft have the same gradients and take the same steps."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
from torch import Tensor, nn

import slimtune
from tensors import (
    activate,
    adapter_gradients,
    adapter_tensors,
    assert_all_near,
    assert_near,
    copies,
    loss_of,
    randomize,
    trainable,
)
from zoo import MIXTURE, SPECIMENS, Specimen

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
STEPS = 3


@pytest.fixture
def file(specimen: Specimen, tmp_path: Path) -> Path:
    """An adapter of peft on disk for the specimen under test."""
    model = peft.get_peft_model(specimen.model(), peft.LoraConfig(r=4, lora_alpha=6, **specimen.options()))
    randomize(peft, model).save_pretrained(tmp_path, save_embedding_layers=False)
    return tmp_path


def load(library: ModuleType, specimen: Specimen, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = library.PeftModel.from_pretrained(specimen.model(), folder, is_trainable=True)
    return model.to(dtype).train()


def batch_of(specimen: Specimen, dtype: torch.dtype) -> dict[str, Tensor]:
    batch = specimen.batch()
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def train(
    library: ModuleType, specimen: Specimen, folder: Path, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a few steps of AdamW, and the adapter after them."""
    model, batch = load(library, specimen, folder, dtype), batch_of(specimen, dtype)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3, weight_decay=0.01)
    losses = []
    for _ in range(STEPS + 1):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        losses.append(loss.detach())
        if len(losses) <= STEPS:
            loss.backward()
            optimizer.step()
    return torch.stack(losses), copies(adapter_tensors(library, model))


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
def test_gradients_agree(specimen: Specimen, file: Path) -> None:
    losses, gradients = [], []
    for library in (slimtune, peft):
        model = load(library, specimen, file)
        loss = loss_of(model, specimen.batch())
        loss.backward()
        losses.append(loss.detach())
        gradients.append(copies(adapter_gradients(library, model)))
    ours, theirs = gradients
    assert_near(*losses)
    assert len(theirs) == len(adapter_tensors(peft, model))
    assert_all_near(ours, theirs)


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
def test_three_steps_of_adamw_have_the_same_losses(specimen: Specimen, file: Path) -> None:
    ours, _ = train(slimtune, specimen, file, torch.float32)
    theirs, _ = train(peft, specimen, file, torch.float32)
    assert_near(ours, theirs)
    assert len(set(theirs.tolist())) == STEPS + 1


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
def test_three_steps_of_adamw_end_at_the_same_adapter(specimen: Specimen, file: Path) -> None:
    """In float64: where a gradient is all but zero, Adam turns its rounding in float32 into a whole step.

    Causal models compute their loss in float32 even so, which is why the bound isn't tighter.
    """
    start = copies(adapter_tensors(peft, load(peft, specimen, file, torch.float64)))
    _, ours = train(slimtune, specimen, file, torch.float64)
    _, theirs = train(peft, specimen, file, torch.float64)
    assert_all_near(ours, theirs, 1e-6)
    assert [key for key, tensor in theirs.items() if torch.equal(tensor, start[key])] == []


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mixture"])
def test_biases_train_alike(name: str, bias: str, tmp_path: Path) -> None:
    specimen = next(specimen for specimen in SPECIMENS if specimen.name == name)
    config = peft.LoraConfig(r=4, bias=bias, **specimen.options())
    randomize(peft, peft.get_peft_model(specimen.model(), config)).save_pretrained(tmp_path)
    our_losses, ours = train(slimtune, specimen, tmp_path, torch.float64)
    their_losses, theirs = train(peft, specimen, tmp_path, torch.float64)
    assert [key for key in theirs if key.endswith("bias")] != []
    assert_near(our_losses, their_losses, 1e-6)
    assert_all_near(ours, theirs, 1e-6)


def test_several_active_adapters_have_the_gradients_of_peft() -> None:
    gradients = []
    for library in (slimtune, peft):
        config = library.LoraConfig(r=4, **MIXTURE.options())
        model = library.get_peft_model(MIXTURE.model(), config, adapter_name="one")
        model.add_adapter("two", library.LoraConfig(r=4, lora_alpha=5, **MIXTURE.options()))
        randomize(library, model, "one", seed=3)
        randomize(library, model, "two", seed=4)
        activate(model, ["one", "two"])
        loss_of(model.train(), MIXTURE.batch()).backward()
        gradients.append({name: copies(adapter_gradients(library, model, name)) for name in ("one", "two")})
    ours, theirs = gradients
    for name in ("one", "two"):
        assert theirs[name] != {}
        assert_all_near(ours[name], theirs[name])
