"""What rows begin with alike is planned as it is trained: computed once, in memory and in time."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from transformers import BertConfig, BertForSequenceClassification, Gemma3Config, LlamaConfig

from slimtune.data.lengths import sorted_lengths
from slimtune.errors import ConfigError
from slimtune.methods.lora.config import LoraConfig
from slimtune.methods.prompt.prefix_tuning import PrefixTuningConfig
from slimtune.methods.prompt.prompt_tuning import PromptTuningConfig
from slimtune.plan.beginnings import Beginnings, can_share
from slimtune.plan.devices import find
from slimtune.plan.memory import MemoryPlan, Setting
from slimtune.plan.plan import simulation
from slimtune.plan.simulate import plan_of
from slimtune.plan.text_part import text_part
from slimtune.plan.time import duration, step_seconds, usual
from slimtune.plan.trace import trace
from slimtune.recipe.training import TrainSettings
from slimtune.train.sharing import sharing

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=128, dtype="float32",
)  # fmt: skip
SETTING = Setting(
    LoraConfig(r=4, task_type="CAUSAL_LM"), dtype="float32", batch=8, sequence=60, task_type="CAUSAL_LM", device="cpu"
)


def examples(prompt: int = 40, answers: tuple[int, int] = (5, 20), count: int = 40) -> list[list[int]]:
    """Rows that share a system prompt."""
    draw = random.Random(1)
    begin = [draw.randrange(64) for _ in range(prompt)]
    return [[*begin, *(draw.randrange(64) for _ in range(draw.randint(*answers)))] for _ in range(count)]


def planned(setting: Setting) -> MemoryPlan:
    return simulation(CONFIG)(setting)


SHARED = Beginnings(examples()).shared_in(SETTING)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_simulated_step_is_the_one_that_runs(checkpointing: bool) -> None:
    setting = replace(SHARED, gradient_checkpointing=checkpointing)
    real = plan_of(trace(CONFIG, setting, "CAUSAL_LM", fake=False), setting)
    simulated = planned(setting)
    assert simulated.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)
    assert simulated.work["forward"].flops == real.work["forward"].flops


def test_what_is_shared_takes_less_memory_and_fewer_operations() -> None:
    assert SHARED.shared is not None
    padded = planned(replace(SHARED, shared=None))
    shared = planned(SHARED)
    assert shared.peak.parts.activations < 2 / 3 * padded.peak.parts.activations
    times = SHARED.shared.tokens / (SHARED.batch * SHARED.sequence)
    assert shared.work["forward"].flops == pytest.approx(times * padded.work["forward"].flops, rel=0.15)


def test_the_time_counts_the_tokens_that_are_computed() -> None:
    assert SHARED.shared is not None
    device, lengths = find("T4"), sorted_lengths(list(map(len, examples())), 100)
    took = duration(planned(SHARED), lengths, 1, device, usual(device))
    padded = duration(planned(replace(SHARED, shared=None)), lengths, 1, device, usual(device))
    # Five batches of eight, each by the tokens of a mean one where the simulated one has those of the fullest.
    computed = SHARED.shared.share * took.tokens
    each = step_seconds(planned(SHARED), usual(device)) / SHARED.shared.tokens
    assert took.seconds == pytest.approx(each * computed, rel=1e-3)
    # Weights are read as often as before.
    assert SHARED.shared.share < took.seconds / padded.seconds < 0.5
    assert (took.tokens, took.steps) == (padded.tokens, padded.steps)


def test_the_fullest_of_some_batches_is_planned() -> None:
    rows = Beginnings(examples()).shared_rows(8)
    assert rows is not None
    assert len(rows.rows) == 8
    assert 40 + 8 * 5 <= rows.tokens <= 40 + 8 * 20
    assert 0 < rows.share < 0.5


def test_batches_of_examples_that_begin_alike_share_more() -> None:
    # Five documents, by the number that each begins with.
    rows = [[number, *row] for row in examples(count=20) for number in range(5)]
    at_random, grouped = (Beginnings(rows, are_grouped).shared_rows(8) for are_grouped in (False, True))
    assert at_random is not None
    assert grouped is not None
    assert grouped.share < 0.7 * at_random.share


def test_nothing_is_shared_where_it_does_not_pay() -> None:
    assert Beginnings(examples(prompt=2, answers=(30, 30))).shared_in(SETTING) is SETTING


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_shared_in_the_plan_as_in_training(kind: Any) -> None:
    setting = replace(SHARED, method=kind(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    real = plan_of(trace(CONFIG, setting, "CAUSAL_LM", fake=False), setting)
    simulated = planned(setting)
    assert simulated.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)
    assert simulated.work["forward"].flops == real.work["forward"].flops
    padded = planned(replace(setting, shared=None))
    assert simulated.work["forward"].flops < 0.6 * padded.work["forward"].flops


def test_only_decoders_share() -> None:
    assert can_share(CONFIG, "CAUSAL_LM")
    assert not can_share(BertConfig(num_hidden_layers=1), "SEQ_CLS")
    # Its text model gets embeddings when it is trained, though that part alone could share.
    part = text_part(Gemma3Config(text_config={"num_hidden_layers": 1}, vision_config={"num_hidden_layers": 1}))
    assert not can_share(part, "CAUSAL_LM")


def test_an_encoder_is_known_before_any_batch_is_drawn() -> None:
    class Untouched:
        def collate(self, rows: object) -> object:
            raise AssertionError("a batch was drawn")

    model = BertForSequenceClassification(
        BertConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    collate = Untouched().collate
    with sharing(model, TrainSettings(), [[1]], collate, Console()):  # type: ignore[arg-type]
        pass
    with pytest.raises(ConfigError, match=r"leave training\.share_prefixes out"):
        sharing(model, TrainSettings(share_prefixes=True), [[1]], collate, Console())  # type: ignore[arg-type]
