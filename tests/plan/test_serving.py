"""What serving takes is planned as the engine takes it, and told by the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import slimtune
from slimtune.cli import app
from slimtune.engine.model import SLOTS, slot_bytes
from slimtune.errors import ConfigError
from slimtune.plan.build import config_of
from slimtune.plan.devices import find
from slimtune.plan.memory import Setting
from slimtune.plan.quantize import tensors_of
from slimtune.plan.serving import ServingPlan, plan_serving
from slimtune.plan.time import Rates, usual
from small_text_model import save_base

NOTHING_FITS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("served") / "base")


def planned(base: Path, device: str = "T4", **options: Any) -> ServingPlan:
    return plan_serving(config_of(base), find(device), setting=Setting(dtype="float32", device="cpu"), **options)


def test_weights_and_slots_are_those_of_the_engine(base: Path) -> None:
    model, tokenizer = slimtune.load(str(base), dtype="float32", device="cpu")
    engine = slimtune.Engine(model, tokenizer, slots=3, context=40)
    plan = planned(base, slots=3, context=40)
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_of(model)}
    assert plan.weights_bytes == sum(held.values())
    assert 3 * plan.key_value_bytes == engine._scheduler._memory.bytes
    assert plan.slot_bytes == plan.key_value_bytes + 3 * 8 * model.config.vocab_size


def test_the_engine_makes_as_many_slots_as_fit(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimtune.engine import model as engine_model

    model, tokenizer = slimtune.load(str(base), dtype="float32", device="cpu")
    assert slimtune.Engine(model, tokenizer, context=40).slots == SLOTS
    each = planned(base, context=40).slot_bytes
    few = type("Memory", (), {"available": 3 * each + 1})()
    monkeypatch.setattr(engine_model, "ram", lambda: few)
    assert slimtune.Engine(model, tokenizer, context=40).slots == 3


def test_the_slots_are_as_many_as_leave_the_margin(base: Path) -> None:
    each = planned(base, context=40)
    assert each.slots == SLOTS
    room = each.weights_bytes + 5 * each.slot_bytes
    card = replace(find("T4"), memory_bytes=int((room + 100) / 0.9) + 1, context_bytes=0, fragmentation=0.0)
    plan = plan_serving(config_of(base), card, context=40, setting=Setting(dtype="float32", device="cpu"))
    assert (plan.slots, plan.most_slots) == (5, 5)
    assert plan.needed_bytes <= 0.9 * card.memory_bytes
    full = plan_serving(config_of(base), card, 50, 40, setting=Setting(dtype="float32", device="cpu"))
    assert not full.fits


def test_a_slot_holds_keys_and_values_of_its_context_and_a_row_of_logits() -> None:
    assert slot_bytes([(2, 8, 8), (2, 8, 4)], 10, 2, 100) == 10 * 2 * 2 * (16 + 12) + 3 * 8 * 100


def test_more_answers_at_once_read_the_weights_once(base: Path) -> None:
    plan, rates = planned(base, context=40), usual(find("T4"))
    one, many = plan.tokens_per_second(rates, 1), plan.tokens_per_second(rates, 8)
    assert one < many < 8 * one


def test_adapters_take_room_and_are_read_beside_the_weights(base: Path) -> None:
    plan = planned(base, context=40, adapters=3, adapter_numbers=100_000)
    assert plan.adapter_bytes > plan.slot_bytes, "else their room would be lost in that of a slot"
    # A device whose products take no time, and which reads a byte a second.
    rates = Rates(flops_16bit=1e30, flops_32bit=1e30, bandwidth=1.0, slack=1.0, is_measured=True)
    read = plan.weights_bytes + 3 * plan.adapter_bytes + 2 * plan.key_value_bytes // 2
    assert plan.tokens_per_second(rates, 2) == pytest.approx(2 / read)
    room = plan.weights_bytes + 3 * plan.adapter_bytes + 5 * plan.slot_bytes
    just = replace(plan.device, memory_bytes=int((room + 100) / 0.9) + 1, context_bytes=0, fragmentation=0.0)
    assert replace(plan, device=just).most_slots == 5


def test_a_context_beyond_the_model_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match="positions"):
        planned(base, context=100_000)


def test_the_command_line_tells_it(base: Path) -> None:
    options = ["plan", str(base), "--serve", "--device", "T4", "--slots", "4", "--adapters", "2", "--max-length", "64"]
    shown = CliRunner().invoke(app, options)
    assert shown.exit_code == 0, shown.output
    for part in ("serving", "T4: 15.6 GB (sold as 16 GB)", "2 x", "4 x", "a context of 64 tokens", "tokens a second"):
        assert part in " ".join(shown.stdout.split()), part
    told = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    live = told["weights_bytes"] + 2 * told["adapter_bytes"] + 4 * told["slot_bytes"]
    assert told["needed_bytes"] == find("T4").needed_bytes(live)
    assert set(told["tokens_per_second"]) == {"1", "4"}
    less = CliRunner().invoke(app, ["plan", str(base), "--serve", "--device", "T4", "--memory", "0.14"])
    assert less.exit_code == NOTHING_FITS
    refused = CliRunner().invoke(app, ["plan", str(base), "--slots", "4"])
    assert refused.exit_code != 0
