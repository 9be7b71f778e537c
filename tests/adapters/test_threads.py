"""One model in many threads: each answer is the one that the same call gives alone, and the model stays as it was."""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import slimtune
from slimtune.adapters.rows import BASE
from tensors import randomize
from zoo import BERT, GPT2, LLAMA, Specimen

Calls = dict[str, tuple[Callable[[], Tensor], Tensor]]
"""What is called, and what it gives alone."""


def run_in_threads(calls: Calls, seconds: float, threads: int = 8) -> tuple[int, list[str]]:
    """The number of calls that were made, and the names of those whose answer was another one."""
    wrong: list[str] = []
    made = [0] * threads
    end = time.monotonic() + seconds

    def work(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end and not wrong:
            name = draw.choice(sorted(calls))
            call, expected = calls[name]
            try:
                if not torch.allclose(call(), expected, atol=1e-5, rtol=1e-4):
                    wrong.append(name)
            except Exception as error:
                wrong.append(f"{name}: {error!r}")
            made[number] += 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(made), wrong


def calls_of(model: Any, batch: dict[str, Tensor], plain: Tensor, with_rows: bool) -> Calls:
    """A plain call, one with adapters disabled, and rows under adapters of their own."""
    names = list(model.peft_config) if with_rows else []

    @torch.no_grad()
    def call(**options: Any) -> Tensor:
        return model(**batch, **options)[0]

    def disabled() -> Tensor:
        with model.disable_adapter():
            return call()

    calls = {"plain": (call, call()), "disabled": (disabled, plain)}
    rows = len(next(iter(batch.values())))
    for shift in range(len(names)):
        mix = [[*names, BASE][(shift + row) % (len(names) + 1)] for row in range(rows)]
        calls[f"rows {mix}"] = (lambda mix=mix: call(adapter_names=mix), call(adapter_names=mix))
    return calls


def whole(specimen: Specimen, config: Any) -> tuple[Any, dict[str, Tensor], Tensor]:
    model = specimen.model().eval()
    batch = {name: tensor for name, tensor in specimen.batch().items() if name != "labels"}
    with torch.no_grad():
        plain = model(**batch)[0]
    model = slimtune.get_peft_model(model, copy.deepcopy(config))
    model.add_adapter("other", copy.deepcopy(config))
    randomize(slimtune, model, "other", seed=7)
    return randomize(slimtune, model).eval(), batch, plain


CASES = {
    "lora-head-whole": (LLAMA, slimtune.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "lora-bias": (GPT2, slimtune.LoraConfig(r=4, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)),
    "tokens": (LLAMA, slimtune.TrainableTokensConfig(token_indices=[4, 5, 6])),
    "norms": (LLAMA, slimtune.LNTuningConfig()),
    "biases": (BERT, slimtune.BitFitConfig()),
    "full-difference": (BERT, slimtune.FullConfig()),
    "full-whole": (LLAMA, slimtune.FullConfig(store="whole")),
}


def check(name: str, seconds: float) -> None:
    model, batch, plain = whole(*CASES[name])
    calls = calls_of(model, batch, plain, with_rows=name.startswith("lora"))
    before = {key: (id(tensor), tensor.clone()) for key, tensor in model.state_dict(keep_vars=True).items()}
    made, wrong = run_in_threads(calls, seconds)
    assert wrong == []
    assert made > 16
    after = model.state_dict(keep_vars=True)
    assert {key: id(tensor) for key, tensor in after.items()} == {key: number for key, (number, _) in before.items()}
    assert all(torch.equal(after[key], tensor) for key, (_, tensor) in before.items())
    for call, expected in calls.values():
        assert torch.allclose(call(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_each_answer_is_the_one_of_the_call_alone(name: str) -> None:
    check(name, 1.5)


@pytest.mark.soak
@pytest.mark.parametrize("name", CASES)
def test_for_five_minutes(name: str) -> None:
    check(name, 300)
