"""The recommendation: candidates fitted into a device by the real simulator, ordered by the goal, with reasons."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import slimtune
from slimtune.errors import ConfigError
from slimtune.plan.devices import Device, find
from slimtune.plan.memory import PRECISIONS
from slimtune.plan.plan import PlanReport, count, plan
from slimtune.recipe.preference import PREFERENCE_TASKS
from small_text_model import save_base, write_lines

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, dtype="bfloat16", name_or_path="tiny",
)  # fmt: skip
WEIGHTS = 2 * (2 * (4 * 512**2 + 3 * 512 * 1024) + 2 * 64 * 512)


def device(memory_bytes: int) -> Device:
    """A GPU with this much memory and nothing in it."""
    return replace(find("RTX 4090"), memory_bytes=memory_bytes, context_bytes=0, fragmentation=0.0)


@cache
def asked(memory_bytes: int = 10**12, **options: Any) -> PlanReport:
    return plan(CONFIG, device=device(memory_bytes), max_length=16, **options)


def labels(report: PlanReport) -> list[str]:
    return [choice.label for choice in report.choices]


def rules(report: PlanReport) -> set[str]:
    assert report.best is not None
    return {rule.name for rule in report.best.reasons}


def test_parameters_are_counted_without_any_weights() -> None:
    parameters, per_rank = count(CONFIG, "CAUSAL_LM")
    assert parameters == WEIGHTS // 2 + 5 * 512
    assert per_rank == 2 * (4 * (512 + 512) + 3 * (512 + 1024))


def test_with_room_for_all_lora_on_the_16_bit_base_is_first() -> None:
    report = asked()
    assert labels(report)[0] == "lora"
    assert all(choice.fits for choice in report.choices)
    best = report.best
    assert best is not None
    assert (best.base, best.rank, best.setting.method.lora_alpha, best.learning_rate) == ("dense", 16, 32, 2e-4)  # type: ignore[union-attr]
    assert (best.setting.batch, best.setting.accumulation, best.setting.gradient_checkpointing) == (16, 1, False)
    assert best.adapter_bytes == 4 * 16 * count(CONFIG, "CAUSAL_LM")[1]
    assert rules(report) >= {"in-context-first", "plenty", "all-linear", "alpha", "learning-rate", "rank"}
    assert report.choices[-1].needed_bytes > 0


@pytest.mark.slow
def test_the_base_is_quantized_when_it_does_not_fit_in_16_bits() -> None:
    report = asked(int(0.95 * WEIGHTS))
    assert report.best is not None
    assert report.best.label == "lora on NF4"
    assert rules(report) >= {"qlora", "not-enough"}
    refused = [choice for choice in report.choices if not choice.fits]
    assert {"lora", "dora", "full"} <= {choice.method for choice in refused if choice.base == "dense"}
    assert [choice.needed_bytes for choice in refused] == sorted(choice.needed_bytes for choice in refused)


def test_a_micro_batch_shrinks_and_is_accumulated_before_checkpoints_are_taken() -> None:
    (roomy,) = asked(methods=("lora",), bases=("dense",), batch_size=16).choices
    (tight,) = asked(roomy.parts.total - 1, methods=("lora",), bases=("dense",)).choices
    setting = tight.setting
    assert tight.fits
    assert setting.batch < 16
    assert setting.batch * setting.accumulation == 16
    assert not setting.gradient_checkpointing


def test_a_micro_batch_is_halved_as_often_as_it_takes() -> None:
    options: dict[str, Any] = {"methods": ("lora",), "bases": ("dense",), "gradient_checkpointing": False}
    (of_four,) = asked(batch_size=4, **options).choices
    (tight,) = asked(int(of_four.parts.total / 0.9) + 2, **options).choices
    assert tight.setting.batch <= 4, "16 and 8 don't fit"
    assert tight.setting.batch * tight.setting.accumulation == 16


@pytest.mark.parametrize("texts", [["one tea"] * 3, ["one tea", "two large lattes, please"]], ids=["alike", "apart"])
def test_rows_of_several_lengths_are_planned_with_their_padding(texts: list[str], tmp_path: Path) -> None:
    """Padded rows take a mask over all pairs of positions, which rows of one length do without."""
    base = save_base(tmp_path / "base")
    data = write_lines(tmp_path / "rows.jsonl", *({"text": text} for text in texts))
    report = plan(str(base), data=data, device=device(10**12), methods=("lora",), bases=("dense",))
    assert report.best is not None
    assert report.best.setting.padded is (len(set(texts)) > 1)


def test_checkpoints_come_when_a_single_example_is_too_much() -> None:
    config = copy.deepcopy(CONFIG)
    config.max_position_embeddings = 512
    options: dict[str, Any] = {"methods": ("lora",), "bases": ("dense",), "batch_size": 1, "max_length": 512}
    (plain,) = plan(config, device=device(10**12), **options).choices
    (tight,) = plan(config, device=device(plain.parts.total - 1), **options).choices
    assert tight.fits
    assert tight.setting.gradient_checkpointing
    assert tight.parts.total < plain.parts.total


def test_a_margin_is_left_free_where_smaller_batches_or_checkpoints_make_room() -> None:
    options: dict[str, Any] = {"methods": ("lora",), "bases": ("dense",)}
    (roomy,) = asked(batch_size=16, **options).choices
    # The whole batch would fill 98% of it.
    card = device(int(roomy.needed_bytes / 0.98))
    (advised,) = plan(CONFIG, device=card, max_length=16, **options).choices
    assert advised.fits
    assert not advised.is_tight
    assert advised.needed_bytes <= 0.9 * card.memory_bytes
    assert advised.setting.batch < 16


def test_the_margin_is_given_up_before_nothing_fits_and_comes_last() -> None:
    options: dict[str, Any] = {"methods": ("lora",), "batch_size": 1, "gradient_checkpointing": True}
    least = min(asked(bases=("dense",), **options).choices, key=lambda choice: choice.needed_bytes)
    report = asked(int(least.needed_bytes / 0.97), bases=("dense", "nf4"), **options)
    assert [(choice.base, choice.fits, choice.is_tight) for choice in report.choices] == [
        ("nf4", True, False), ("dense", True, True),
    ]  # fmt: skip


def test_a_processor_has_no_margin_for_its_plans_were_measured() -> None:
    assert find("cpu").advised_bytes == find("cpu").room_bytes


@pytest.mark.slow
def test_nothing_fits() -> None:
    report = asked(WEIGHTS // 10)
    assert report.best is None
    assert all(choice.needed_bytes > WEIGHTS // 10 for choice in report.choices)
    assert not report.to_dict()["fits"]


@pytest.mark.parametrize(
    ("goal", "first", "rule"),
    [
        ("quality", "dora", "dora"),
        ("domain", "full", "full-for-domains"),
        ("tiny", "prompt-tuning", "soft-prompt"),
    ],
)
def test_the_goal_decides_what_comes_first(goal: str, first: str, rule: str) -> None:
    report = asked(goal=goal, bases=("dense",))
    assert labels(report)[0] == first
    assert rule in rules(report)


def test_a_domain_takes_a_high_rank_where_full_tuning_does_not_fit() -> None:
    report = asked(4 * WEIGHTS, goal="domain", bases=("dense",))
    assert report.best is not None
    assert (report.best.method, report.best.rank) == ("lora", 64)
    assert "full-for-domains" in rules(report)


def test_what_is_served_in_4_bits_is_tuned_in_4_bits() -> None:
    report = asked(served_on=device(WEIGHTS // 2), methods=("lora",))
    assert report.best is not None
    assert report.best.base == "nf4"
    assert "tight-inference" in rules(report)


def test_several_devices_share_what_one_cannot_hold() -> None:
    options: dict[str, Any] = {"methods": ("full",), "batch_size": 1}
    (alone,) = asked(**options).choices
    limit = int(0.9 * alone.parts.total)
    (one,), (four,) = asked(limit, **options).choices, asked(limit, devices=4, **options).choices
    assert not one.fits
    assert four.fits


def test_several_devices_share_the_examples_of_a_step() -> None:
    options: dict[str, Any] = {"methods": ("lora",), "bases": ("dense",)}
    (one,), (four,) = asked(**options).choices, asked(devices=4, **options).choices
    assert (one.setting.batch, four.setting.batch) == (16, 4)
    assert four.duration.steps == one.duration.steps
    assert 0 < four.duration.exchange_seconds < four.duration.seconds


@pytest.mark.slow
def test_every_base_of_loading_can_be_asked_for() -> None:
    report = asked(bases=PRECISIONS[1:])
    assert {choice.base for choice in report.choices} == set(PRECISIONS) - {"dense"}
    assert "lora on int8-torchao" in labels(report)


@pytest.mark.parametrize("task", PREFERENCE_TASKS)
def test_preferences_are_planned_with_a_tenth_of_the_rate(task: str) -> None:
    short = {"max_new_tokens": 8} if task == "grpo" else {}
    report = asked(task=task, goal="tiny", bases=("dense",), **short)
    assert all(choice.setting.task == task for choice in report.choices)
    # TRL would pass by what stands around the whole model.
    assert "prompt-tuning" not in {choice.method for choice in report.choices}
    lora = next(choice for choice in report.choices if choice.method == "lora")
    assert lora.learning_rate == pytest.approx(2e-5)
    assert f"task={task}" in shlex.split(report.command(lora))


def test_all_that_a_training_may_have_can_be_asked_for() -> None:
    options: dict[str, Any] = {"methods": ("lora",), "bases": ("dense",), "batch_size": 2}
    (plain,) = asked(**options).choices
    (other,) = asked(**options, optim="sgd", attention="eager", evaluation=True, merge=True).choices
    assert (other.setting.optimizer, other.setting.attention) == ("sgd", "eager")
    assert {"evaluation", "merge"} == {m.phase for m in other.plan.snapshots} - {m.phase for m in plain.plan.snapshots}
    assert plain.merge_bytes is None
    assert other.merge_bytes == other.plan.at("merge").total
    assert plain.parts.optimizer > other.parts.optimizer == 0


def test_engines_that_take_the_adapter_are_told() -> None:
    by_method = {choice.label: {v.engine: v.takes for v in choice.engines} for choice in asked().choices}
    assert by_method["lora"] == {"peft": True, "vLLM": True, "llama.cpp": True}
    assert by_method["dora"]["vLLM"] is False
    assert by_method["full"] == {}


@pytest.mark.slow
def test_the_command_says_all_that_was_chosen() -> None:
    report = asked(int(0.95 * WEIGHTS), dtype="float16")
    assert report.best is not None
    words = shlex.split(report.command(report.best, "out"))
    assert words[:6] == ["slimtune", "train", "tiny", "DATA.jsonl", "--output", "out"]
    options = dict(pairwise(words))
    assert options["--quantize"] == "nf4"
    assert "model.dtype=float16" in words
    assert int(options["--batch-size"]) == report.best.setting.batch


def test_a_card_without_bf16_gets_float16() -> None:
    report = plan(CONFIG, device="T4", methods=["lora"], bases=["dense"], max_length=8)
    assert report.best is not None
    assert report.best.setting.dtype == "float16"


def test_python_gives_the_same_objects() -> None:
    report = slimtune.plan(CONFIG, device=device(10**12), methods=["ia3"], bases=["dense"], max_length=8)
    assert isinstance(report, PlanReport)
    assert labels(report) == ["ia3"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"goal": "qualty"}, "did you mean 'quality'"),
        ({"methods": ["lorra"]}, "did you mean 'lora'"),
        ({"methods": ["features"]}, "features"),
        ({"bases": ["nf5"]}, "nf5"),
        ({"methods": ["full"], "bases": ["nf4"]}, "full"),
        ({"device": "RTX 50900"}, "did you mean 'rtx 5090'"),
        ({"rank": 0}, "rank"),
        ({"rank": -4}, "-4"),
        ({"batch_size": 0}, "batch_size"),
        ({"gradient_accumulation": 1.5}, "gradient_accumulation"),
        ({"max_length": 1}, "max_length"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": float("nan")}, "epochs"),
        ({"devices": 0}, "devices"),
        ({"dtype": "bfloat61"}, "did you mean 'bfloat16'"),
        ({"memory_gb": -1}, "memory"),
        ({"price_per_hour": -1}, "price"),
        ({"task": "dop"}, "did you mean 'dpo'"),
        ({"task": "dpo", "generations": 4}, "generations would change nothing with task dpo"),
        ({"max_new_tokens": 4}, "max_new_tokens would change nothing with task text"),
        ({"task": "grpo", "max_new_tokens": 0}, "max_new_tokens"),
        ({"task": "grpo"}, "64 positions, and answers of 512 tokens"),
        ({"max_length": 65}, "64 positions"),
        ({"optim": "adamw_8bits"}, "did you mean 'adamw_8bit'"),
        ({"attention": "flash"}, "attention must be one of"),
        ({"device": "cpu", "devices": 2}, "cpu can't share a training"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(wrong: dict[str, Any], said: str) -> None:
    asking: Callable[..., PlanReport] = plan
    with pytest.raises(ConfigError, match=said):
        asking(CONFIG, **{"device": "T4"} | wrong)
