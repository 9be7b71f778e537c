"""Time and cost: operations counted in the simulated step, a device's rates, the user's lengths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from slimtune.data.lengths import Lengths
from slimtune.errors import ConfigError
from slimtune.methods.lora.config import LoraConfig
from slimtune.plan.data import uniform
from slimtune.plan.devices import find
from slimtune.plan.memory import STEP, MemoryPlan, Setting, Work
from slimtune.plan.plan import simulation
from slimtune.plan.time import Rates, calibrate, calibration_file, duration, rates_of, step_seconds, usual

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4, dtype="bfloat16"
)
WEIGHTS = 3 * (4 * 512 * 512 + 3 * 512 * 1024)
TOKENS = 4 * 32
T4 = find("T4")


def planned(**changes: object) -> MemoryPlan:
    setting = Setting(batch=4, sequence=32, padded=False, task_type="CAUSAL_LM", device="cpu")
    return simulation(CONFIG)(replace(setting, **changes))  # type: ignore[arg-type]


def flops(plan: MemoryPlan) -> int:
    return sum(plan.work[phase].flops for phase in STEP if phase in plan.work)


@pytest.mark.parametrize(
    ("method", "checkpointing", "by_rule"),
    [(LoraConfig(r=1), False, 4), (None, False, 6), (LoraConfig(r=1), True, 6), (None, True, 8)],
    ids=["frozen", "trained", "frozen, checkpointing", "trained, checkpointing"],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_operations_are_those_of_the_rule(
    method: LoraConfig | None, checkpointing: bool, by_rule: int, device: str
) -> None:
    plan = planned(method=method, gradient_checkpointing=checkpointing, device=device)
    assert flops(plan) == pytest.approx(by_rule * WEIGHTS * TOKENS, rel=0.06)


def test_an_accumulated_step_is_as_many_batches() -> None:
    once, thrice = planned(method=LoraConfig(r=1)), planned(method=LoraConfig(r=1), accumulation=3)
    assert flops(thrice) == 3 * flops(once)


def test_seconds_are_work_over_rates() -> None:
    rates = Rates(flops_16bit=100.0, flops_32bit=10.0, bandwidth=50.0, slack=2.0, is_measured=True)
    assert rates.seconds(Work(1000, 100), is_half=True) == 2 * (10 + 2)
    assert rates.seconds(Work(1000, 100), is_half=False) == 2 * (100 + 2)


def test_a_training_counts_its_padded_tokens_and_costs_by_the_hour() -> None:
    plan, lengths = planned(method=LoraConfig(r=1), accumulation=2), Lengths((8, 8, 16, 32), learned=20)
    rates = usual(T4)
    found = duration(plan, lengths, epochs=3, device=T4, rates=rates)
    assert found.tokens == 3 * 4 * 32
    assert found.steps == 2
    assert found.seconds == pytest.approx(step_seconds(plan, rates) * 3 / 2)
    assert found.cost == pytest.approx(found.seconds / 3600 * T4.price_per_hour)  # type: ignore[operator]
    assert not found.is_measured
    assert duration(plan, lengths, 3, replace(T4, price_per_hour=None), rates).cost is None
    assert [duration(plan, lengths, epochs, T4, rates).steps for epochs in (0, 1, 2, 3, 4)] == [1, 1, 1, 2, 2]


def test_a_faster_device_is_faster_and_longer_texts_are_slower() -> None:
    plan = planned(method=LoraConfig(r=1))

    def took(name: str, lengths: Lengths) -> float:
        return duration(plan, lengths, 1, find(name), usual(find(name))).seconds

    assert took("H100", uniform(32, 100)) < took("RTX 4090", uniform(32, 100)) < took("T4", uniform(32, 100))
    assert took("T4", uniform(16, 100)) < took("T4", uniform(32, 100))


@pytest.mark.parametrize("method", [None, LoraConfig(r=1)], ids=["full", "lora"])
def test_several_devices_divide_the_work_and_wait_for_what_they_exchange(method: LoraConfig | None) -> None:
    plan, lengths, rates = planned(method=method), uniform(32, 160), usual(T4)
    one, four = (duration(plan, lengths, 1, T4, rates, devices) for devices in (1, 4))
    gathered = plan.peak.parts.weights + (plan.trainable_bytes if method else 0)
    assert plan.exchanged_bytes(4) == (2 * gathered + plan.trainable_bytes) * 3 // 4
    assert one.exchange_seconds == 0
    # Ten micro-batches of four on each device, at four fifths of what PCI Express 3.0 gives.
    assert four.exchange_seconds == pytest.approx(10 * plan.exchanged_bytes(4) / (0.8 * 15.75e9))
    assert four.seconds == pytest.approx(one.seconds / 4 + four.exchange_seconds)
    assert four.steps == one.steps / 4
    assert four.cost == pytest.approx(4 * four.seconds / 3600 * T4.price_per_hour)  # type: ignore[operator]


def test_answers_that_are_drawn_take_their_time() -> None:
    few, many = (planned(method=LoraConfig(r=1), task="grpo", generations=4, answer=answer) for answer in (16, 64))
    lengths = uniform(32, 100)
    short, long = (duration(plan, lengths, 1, T4, usual(T4)) for plan in (few, many))
    assert short.steps == long.steps == 100
    assert (short.tokens, long.tokens) == (400 * 48, 400 * 96)
    assert long.seconds > 1.5 * short.seconds
    # A step is one of four answers, each behind its prompt; the planned prompt is as long as those of the data.
    assert long.seconds == pytest.approx(step_seconds(many, usual(T4)) * long.tokens / (4 * (32 + 64)))


def test_negative_epochs_are_refused() -> None:
    with pytest.raises(ConfigError, match="-1"):
        duration(planned(), uniform(8, 8), -1, T4, usual(T4))


@pytest.mark.usefixtures("short_calibration")
def test_rates_are_measured_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = find("cpu")
    assert rates_of(device) == usual(device)
    said: list[str] = []
    rates = calibrate(device, said.append)
    assert rates.is_measured
    assert min(rates.flops_16bit, rates.flops_32bit, rates.bandwidth) > 1e8
    assert 0.1 < rates.slack < 50
    assert len(said) == 2
    assert rates_of(device) == rates
    assert calibration_file().is_relative_to(tmp_path)
    torch.set_num_threads(torch.get_num_threads() + 1)
    try:
        assert not rates_of(device).is_measured
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"cpu, 1 threads": {"slack": 1}})])
def test_a_damaged_calibration_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibration_file().parent.mkdir(parents=True)
    calibration_file().write_text(content)
    assert not rates_of(find("cpu")).is_measured


@pytest.mark.slow
def test_expanding_a_quantized_base_takes_as_long_as_its_bytes_twice_a_step_and_once_more_with_checkpointing() -> None:
    rates = usual(find("A100 80GB"))
    method = LoraConfig(r=8, task_type="CAUSAL_LM")

    def longer(sequence: int, checkpointing: bool) -> tuple[float, float]:
        dense, nf4 = (
            step_seconds(
                planned(method=method, base=base, batch=1, sequence=sequence, gradient_checkpointing=checkpointing,
                        device="cuda"),
                rates,
            )
            for base in ("dense", "nf4")
        )  # fmt: skip
        return nf4 - dense, nf4 / dense

    for checkpointing, times in ((False, 2), (True, 3)):
        # Half a byte is read and two are written a weight; scales come on top.
        least = times * 2.5 * WEIGHTS / rates.bandwidth * rates.slack
        assert least < longer(32, checkpointing)[0] < 1.3 * least
        # It costs the same whatever the batch, and so counts most where there are few tokens.
        assert longer(32, checkpointing)[1] > longer(512, checkpointing)[1] > 1
