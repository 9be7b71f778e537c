"""Started from the same adapter file, slimtune and peft have the same gradients and take the same steps."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import peft
import pytest
import slimtune
import torch
from torch import Tensor, nn

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
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An adapter of peft on disk for the specimen under test."""
    specimen: Specimen = request.getfixturevalue("specimen")
    options = specimen.lora if not hasattr(request, "param") else {**specimen.lora, **request.param}
    model = peft.get_peft_model(specimen.model(), peft.LoraConfig(r=4, lora_alpha=6, **options))
    randomize(peft, model).save_pretrained(tmp_path, save_embedding_layers=False)
    return tmp_path


def load(library: ModuleType, specimen: Specimen, folder: Path) -> nn.Module:
    model = library.PeftModel.from_pretrained(specimen.model(), folder, is_trainable=True)
    return model.train()


def train(library: ModuleType, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter after a few steps of AdamW."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3, weight_decay=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return copies(adapter_tensors(library, model))


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
def test_three_steps_of_adamw_agree(specimen: Specimen, file: Path) -> None:
    start = copies(adapter_tensors(peft, load(peft, specimen, file)))
    ours = train(slimtune, load(slimtune, specimen, file), specimen.batch())
    theirs = train(peft, load(peft, specimen, file), specimen.batch())
    assert_all_near(ours, theirs)
    unmoved = [key for key, tensor in theirs.items() if torch.equal(tensor, start[key])]
    assert unmoved == []


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mixture"])
def test_biases_train_alike(name: str, bias: str, tmp_path: Path) -> None:
    specimen = next(specimen for specimen in SPECIMENS if specimen.name == name)
    config = peft.LoraConfig(r=4, bias=bias, **specimen.lora)
    randomize(peft, peft.get_peft_model(specimen.model(), config)).save_pretrained(tmp_path)
    ours = train(slimtune, load(slimtune, specimen, tmp_path), specimen.batch())
    theirs = train(peft, load(peft, specimen, tmp_path), specimen.batch())
    assert [key for key in theirs if key.endswith("bias")] != []
    assert_all_near(ours, theirs)


def test_several_active_adapters_have_the_gradients_of_peft() -> None:
    gradients = []
    for library in (slimtune, peft):
        config = library.LoraConfig(r=4, **MIXTURE.lora)
        model = library.get_peft_model(MIXTURE.model(), config, adapter_name="one")
        model.add_adapter("two", library.LoraConfig(r=4, lora_alpha=5, **MIXTURE.lora))
        randomize(library, model, "one", seed=3)
        randomize(library, model, "two", seed=4)
        activate(model, ["one", "two"])
        loss_of(model.train(), MIXTURE.batch()).backward()
        gradients.append({name: copies(adapter_gradients(library, model, name)) for name in ("one", "two")})
    ours, theirs = gradients
    for name in ("one", "two"):
        assert theirs[name] != {}
        assert_all_near(ours[name], theirs[name])
