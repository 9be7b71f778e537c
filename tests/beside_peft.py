"""What has to agree between slimtune and peft for a method: said once, run by each method's tests."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

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
    trainable,
)
from zoo import LLAMA, T5, Specimen

STEPS = 3


@dataclass(frozen=True)
class Case:
    """One config of a method, by the name of its class, on one model."""

    config: str
    specimen: Specimen
    options: dict[str, Any] = field(default_factory=dict)

    def model(self, library: ModuleType) -> Any:
        """The model with the adapter as it is when training starts."""
        config = getattr(library, self.config)(**copy.deepcopy(self.options))
        return library.get_peft_model(self.specimen.model(), config)

    def tuned(self, library: ModuleType) -> Any:
        """The model with each tensor of the adapter somewhere else, the same in both libraries."""
        return randomize(library, self.model(library))

    def batch(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        batch = self.specimen.batch()
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}

    def inputs(self) -> dict[str, Tensor]:
        """The batch without labels; an encoder-decoder decodes these."""
        batch = self.batch()
        labels = batch.pop("labels", None)
        return batch | {"decoder_input_ids": labels} if labels is not None and self.specimen is T5 else batch


def check_forward_and_files(case: Case, folder: Path) -> None:
    """Equal outputs, equal files, each library reading the other's."""
    ours, theirs = case.tuned(slimtune), case.tuned(peft)
    assert_same(adapter_tensors(slimtune, ours), adapter_tensors(peft, theirs))
    base, expected = predict(case.specimen.model(), case.inputs()), predict(theirs, case.inputs())
    assert (expected - base).abs().max() > 1e-3 * base.abs().max(), "otherwise two bases would agree"
    assert_near(predict(ours, case.inputs()), expected)
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(folder / name, save_embedding_layers=False)
    assert_same(*(load_file(folder / name / "adapter_model.safetensors") for name in ("ours", "theirs")))
    read_by_peft = peft.PeftModel.from_pretrained(case.specimen.model(), folder / "ours")
    read_by_us = slimtune.PeftModel.from_pretrained(case.specimen.model(), folder / "theirs")
    assert_near(predict(read_by_peft, case.inputs()), expected)
    assert_near(predict(read_by_us, case.inputs()), expected)


def check_gradients(case: Case) -> None:
    """Equal gradients of every parameter, and equally many that are trained."""
    gradients, counts = [], []
    for library in (slimtune, peft):
        model = case.tuned(library).to(torch.float64).train()
        loss_of(model, case.batch(torch.float64)).backward()
        gradients.append(copies(adapter_gradients(library, model)))
        counts.append(model.get_nb_trainable_parameters()[0])
    ours, theirs = gradients
    assert theirs != {}
    assert counts[0] == counts[1]
    assert_all_near(ours, theirs, 1e-6)


def check_three_steps(case: Case) -> None:
    """Equal losses and equal adapters after steps of AdamW, in float64."""
    ours, theirs = (_trained(case, library) for library in (slimtune, peft))
    assert_near(ours[0], theirs[0], 1e-6)
    assert_all_near(ours[1], theirs[1], 1e-6)


def _trained(case: Case, library: ModuleType) -> tuple[Tensor, dict[str, Tensor]]:
    model = case.tuned(library).to(torch.float64).train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3, weight_decay=0.01)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, case.batch(torch.float64))
        losses.append(loss.detach())
        loss.backward()
        optimizer.step()
    assert len({float(loss) for loss in losses}) == STEPS
    return torch.stack(losses), copies(adapter_tensors(library, model))


def check_merge(case: Case) -> None:
    """Equal weights after a merge."""
    ours, theirs = (case.tuned(library).merge_and_unload() for library in (slimtune, peft))
    assert_all_near(_state(ours), _state(theirs), 1e-6)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def check_generation(config: str, **options: Any) -> None:
    """The same tokens from a prompt, and others than without the adapter."""
    case = Case(config, LLAMA, options)
    prompt = torch.arange(4, 20).view(2, 8)
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    models: list[Any] = [case.tuned(slimtune), case.tuned(peft), case.specimen.model()]
    ours, theirs, base = (
        model.eval().generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings) for model in models
    )
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, base)


class Agreement:
    """What is asked of the cases of a method; a module of tests subclasses it as `TestAgreement`.

    Attributes:
        cases: by name, those whose outputs and files have to agree.
        trained: those that are trained as well, if not all.
        merged: those that are merged as well, if not all.
    """

    cases: ClassVar[dict[str, Case]]
    trained: ClassVar[dict[str, Case] | None] = None
    merged: ClassVar[dict[str, Case] | None] = None

    def test_forward_and_files_agree(self, case: Case, tmp_path: Path) -> None:
        check_forward_and_files(case, tmp_path)

    def test_gradients_agree(self, trained: Case) -> None:
        check_gradients(trained)

    def test_three_steps_agree(self, trained: Case) -> None:
        check_three_steps(trained)

    def test_merges_agree(self, merged: Case) -> None:
        check_merge(merged)
