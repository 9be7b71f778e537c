"""The plan against the thing itself: the same step run on real tensors under the same counter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from benchmarks.plan_accuracy import METHODS, MODELS, Case

import slimtune
from simulated import both
from slimtune.plan.extrapolate import Blocks
from slimtune.plan.simulate import setting_of, simulate
from slimtune.plan.trace import trace
from slimtune.quantization.config import TORCHAO_KINDS
from slimtune.recipe.optimizers import OFFLOADED, OPTIMIZERS, TORCHAO

TOLERANCE = 0.01
MEDIUM = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
CASES = [
    *(Case("Llama-like", method, "nf4", checkpointing=True) for method in METHODS if method not in ("full", "BitFit")),
    *(Case("GPT-2-like", method) for method in METHODS),
    *(Case("BERT-like", method, "int8") for method in ("LoRA", "DoRA", "BitFit", "bottleneck", "VeRA")),
    *(Case("T5-like", method, "nf4") for method in ("LoRA", "IA3", "prefix tuning", "LoHa")),
    *(Case("ViT-like", method) for method in ("LoRA, dropout", "full", "bottleneck")),
    Case("Llama-like", "LoRA", "int8"),
    *(
        Case("Llama-like", method, base)
        for base in ("fp4", "int8-torchao", "int4-torchao")
        for method in ("LoRA", "DoRA")
    ),
    *(Case(model, "LoRA", base, checkpointing=True) for base in TORCHAO_KINDS for model in ("BERT-like", "T5-like")),
    Case("Llama-like", "full", checkpointing=True),
    Case("SmolLM2-135M", "LoRA", checkpointing=True),
]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-{case.method}-{case.base}")
def test_the_simulated_peak_is_the_one_of_the_real_step(case: Case) -> None:
    error = case.error()
    assert error is not None
    assert abs(error) <= TOLERANCE


SETTINGS: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulation": 3},
    "eager attention": {"attention": "eager"},
    "rows of one length": {"padded": False},
    "float16": {"dtype": "float16"},
    "FP4, not nested": {"base": "fp4", "double_quantization": False},
    "Adafactor": {"optimizer": "adafactor"},
    "SGD": {"optimizer": "sgd"},
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)
def test_each_setting_is_simulated_as_it_runs(fields: dict[str, Any]) -> None:
    method = slimtune.LoraConfig(r=16, task_type="CAUSAL_LM")
    setting = setting_of(method, {"batch": 3, "sequence": 32, "device": "cpu", "task_type": "CAUSAL_LM"} | fields)
    simulated, really = both(MODELS["Llama-like"].config, setting, evaluation=True, merge=True)
    assert [snapshot.phase for snapshot in simulated.snapshots] == [snapshot.phase for snapshot in really.snapshots]
    for phase in ("forward", "backward", "evaluation", "merge"):
        assert simulated.at(phase).total == pytest.approx(really.at(phase).total, rel=TOLERANCE), phase
    assert simulated.work["forward"].flops * 2 == really.work["forward"].flops


@pytest.mark.one_in(4)
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name not in TORCHAO])
def test_each_state_of_full_tuning_is_simulated_as_it_is_kept(optimizer: str) -> None:
    fields = {"optimizer": optimizer, "batch": 2, "sequence": 8, "device": "cpu", "task_type": "CAUSAL_LM"}
    simulated, really = both(MODELS["Llama-like"].config, setting_of(None, fields))
    kept = really.at("backward").parts.optimizer
    assert simulated.at("backward").parts.optimizer == kept
    assert (kept == 0) == (optimizer in ("sgd", OFFLOADED))
    assert simulated.paged_bytes == really.paged_bytes
    assert simulated.peak_bytes == pytest.approx(really.peak_bytes, rel=TOLERANCE)


def test_autocast_over_float32_weights_is_simulated_as_it_runs() -> None:
    setting = setting_of(
        None,
        {"dtype": "float32", "autocast": True, "batch": 2, "sequence": 32, "device": "cpu", "task_type": "CAUSAL_LM"},
    )
    simulated, really = both(MODELS["Llama-like"].config, setting)
    assert simulated.peak_bytes == pytest.approx(really.peak_bytes, rel=TOLERANCE)


def llama(layers: int, **changes: Any) -> Any:
    return transformers.LlamaConfig(**MEDIUM, num_hidden_layers=layers, vocab_size=2000, **changes)


def gemma(layers: int) -> Any:
    kinds = ["sliding_attention", "full_attention"]
    return transformers.Gemma3TextConfig(
        **MEDIUM, head_dim=8, num_hidden_layers=layers, vocab_size=500, sliding_window=8,
        layer_types=[kinds[i % 2] for i in range(layers)],
    )  # fmt: skip


DEEP: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA": (slimtune.LoraConfig(r=4), {"evaluation": True, "merge": True}),
    "QLoRA, checkpointing": (slimtune.LoraConfig(r=4), {"base": "nf4", "gradient_checkpointing": True}),
    "DoRA, accumulation": (slimtune.LoraConfig(r=4, use_dora=True), {"accumulation": 4}),
    "full, checkpointing": (None, {"gradient_checkpointing": True}),
    "prefix tuning": (slimtune.PrefixTuningConfig(num_virtual_tokens=3), {}),
}


KINDS = [(llama(10), *case) for case in DEEP.values()] + [(gemma(14), *DEEP["LoRA"])]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("config", "method", "fields"), KINDS, ids=[*DEEP, "two kinds of blocks"])
def test_a_deep_model_is_continued_from_two_shallow_ones_to_the_byte(
    method: Any, fields: dict[str, Any], config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    depths = []
    monkeypatch.setattr(
        "slimtune.plan.simulate.trace",
        lambda short, *a, **k: depths.append(short.num_hidden_layers) or trace(short, *a, **k),
    )
    fields = {"batch": 2, "sequence": 24, "task_type": "CAUSAL_LM"} | fields
    continued = simulate(config, method, **fields)
    assert max(depths) < config.num_hidden_layers
    whole = simulate(config, method, whole=True, **fields)
    assert replace(continued, work={}) == replace(whole, work={})
    for phase, work in whole.work.items():
        assert continued.work[phase].flops == work.flops
        # What slices of one tensor for all blocks write grows with the square of the depth.
        assert continued.work[phase].bytes_moved == pytest.approx(work.bytes_moved, rel=0.02)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("config", "method", "fields"), KINDS, ids=[*DEEP, "two kinds of blocks"])
def test_results_that_are_remembered_are_those_that_torch_gives(
    method: Any, fields: dict[str, Any], config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"batch": 2, "sequence": 24, "task_type": "CAUSAL_LM", "whole": True} | fields
    # Once to fill the memory, and once from it.
    simulate(config, method, **fields)
    remembered = simulate(config, method, **fields)
    monkeypatch.setattr("slimtune.plan.fake_results._kind", lambda func: "other")
    assert simulate(config, method, **fields) == remembered


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "method",
    [
        slimtune.LoraConfig(r=4, rank_pattern={"layers.3.self_attn.q_proj": 8}),
        slimtune.LoraConfig(layers_to_transform=[2]),
    ],
    ids=["ranks by pattern", "one layer"],
)
def test_blocks_that_are_not_adapted_alike_are_simulated_one_by_one(method: Any) -> None:
    setting: dict[str, Any] = {"batch": 2, "sequence": 24, "task_type": "CAUSAL_LM"}
    assert simulate(llama(10), method, **setting) == simulate(llama(10), method, whole=True, **setting)


def test_blocks_are_counted_from_the_nearer_end() -> None:
    blocks = Blocks("model.layers", count=80, leading=0, period=1)
    assert blocks.depths == (4, 5)
    assert [blocks.label(f"model.layers.{i}.mlp", 5) for i in range(5)] == [
        "model.layers.0.mlp", "model.layers.1.mlp", None, "model.layers.-2.mlp", "model.layers.-1.mlp",
    ]  # fmt: skip
    assert blocks.unlabelled("model.layers.-1.mlp") == "model.layers.79.mlp"


@pytest.mark.slow
def test_a_real_model_trains_the_same_after_a_simulation() -> None:
    """What libraries keep for the whole process must not have become fake."""

    def loss() -> float:
        torch.manual_seed(0)
        case = Case("Llama-like", "LoRA", "nf4")
        config, setting = case.asked()
        from slimtune.plan.trace import prepare

        run = prepare(config, setting, setting.task_type, fake=False)
        ids = torch.arange(32).view(2, 16)
        value = run.model(input_ids=ids, labels=ids).loss
        value.backward()
        return value.item()

    before = loss()
    simulate(llama(3), slimtune.LoraConfig(), base="nf4", optimizer="adamw_8bit", task_type="CAUSAL_LM", sequence=8)
    assert loss() == before
