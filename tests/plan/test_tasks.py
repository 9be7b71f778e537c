"""Tasks other than writing texts: their simulated steps against real ones, and against training itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from benchmarks.plan_accuracy import MODELS
from rich.console import Console

import slimtune
from simulated import both, peak_of
from slimtune.data.settings import DataSettings
from slimtune.data.tasks.registry import read
from slimtune.errors import ConfigError
from slimtune.plan.build import build
from slimtune.plan.data import measure
from slimtune.plan.memory import MemoryPlan, Setting
from slimtune.plan.memory_tracker import MemoryTracker
from slimtune.plan.simulate import setting_of, simulate
from slimtune.plan.step import layers_of, prefill, supervised_step
from slimtune.recipe.preference import PREFERENCE_TASKS, PreferenceSettings
from slimtune.recipe.training import TrainSettings
from slimtune.train.loop import fine_tune
from slimtune.train.preferences import preference
from small_seq2seq import SIZES, WORDS, seq2seq_tokenizer, t5
from small_text_model import tiny_model, tiny_tokenizer, write_lines

TOLERANCE = 0.01
BATCH: dict[str, Any] = {"batch": 4, "sequence": 32, "device": "cpu"}


def lora(task_type: str = "CAUSAL_LM", **options: Any) -> Any:
    return slimtune.LoraConfig(r=8, task_type=task_type, **options)


def llama() -> Any:
    return MODELS["Llama-like"].config()


TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "tagging": ("BERT-like", {"task_type": "TOKEN_CLS"}),
    "classes": ("T5-like", {"task_type": "SEQ_2_SEQ_LM"}),
    "short answers": ("T5-like", {"task_type": "SEQ_2_SEQ_LM", "answer": 7}),
    "long answers": ("T5-like", {"task_type": "SEQ_2_SEQ_LM", "answer": 60, "base": "nf4"}),
    "dpo": ("Llama-like", {"task_type": "CAUSAL_LM", "task": "dpo"}),
    "dpo on nf4": ("Llama-like", {"task_type": "CAUSAL_LM", "task": "dpo", "base": "nf4"}),
    "dpo, checkpoints": ("Llama-like", {"task_type": "CAUSAL_LM", "task": "dpo", "gradient_checkpointing": True}),
    "kto": ("Llama-like", {"task_type": "CAUSAL_LM", "task": "kto", "accumulation": 2}),
    "orpo": ("Llama-like", {"task_type": "CAUSAL_LM", "task": "orpo"}),
    "grpo": ("Llama-like", {"task_type": "CAUSAL_LM", "task": "grpo", "generations": 4, "answer": 20}),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("model", "fields"), TASKS.values(), ids=TASKS)
def test_a_step_is_simulated_as_it_runs(model: str, fields: dict[str, Any]) -> None:
    setting = setting_of(lora(fields["task_type"]), BATCH | fields)
    simulated, really = both(MODELS[model].config, setting, evaluation=True)
    assert [snapshot.phase for snapshot in simulated.snapshots] == [snapshot.phase for snapshot in really.snapshots]
    for snapshot in really.snapshots:
        if snapshot.phase != "load":
            assert simulated.at(snapshot.phase).total == pytest.approx(snapshot.total, rel=TOLERANCE), snapshot.phase
    assert simulated.work["forward"].flops * 2 == really.work["forward"].flops


@pytest.mark.parametrize(
    ("model", "task_type"),
    [("BERT-like", "TOKEN_CLS"), ("BERT-like", "SEQ_CLS"), ("T5-like", "SEQ_2_SEQ_LM"), ("Llama-like", "SEQ_CLS")],
)
def test_the_loss_of_a_step_in_16_bits_is_computed_in_32_as_that_of_training(model: str, task_type: str) -> None:
    setting = setting_of(None, BATCH | {"sequence": 8, "dtype": "bfloat16", "task_type": task_type})
    step = supervised_step(build(MODELS[model].config(), setting, task_type), setting)
    assert step.loss(step.batch()).dtype == torch.float32


class WithAllLogits(transformers.LlamaForCausalLM):
    """A model as its own authors write it, which computes all logits."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, use_cache: Any = None) -> Any:  # type: ignore[override]
        return super().forward(input_ids, attention_mask, use_cache=use_cache)


@pytest.mark.parametrize("made", [transformers.LlamaForCausalLM, WithAllLogits])
def test_of_a_prompt_one_position_has_logits_where_the_model_can_leave_out_the_others(made: Any) -> None:
    model = made(llama())
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda module, given, result: shapes.append(tuple(result.shape)))
    with torch.no_grad():
        cache = prefill(model, rows=3, tokens=9)
    assert shapes == [(3, 9 if made is WithAllLogits else 1, model.config.vocab_size)]
    assert all((tensor.shape[0], tensor.shape[2]) == (3, 9) for layer in layers_of(cache) for tensor in layer)


@pytest.mark.parametrize("task", ["dpo", "kto", "orpo", "grpo"])
def test_all_weights_can_be_tuned_by_preferences(task: Any) -> None:
    fields = BATCH | {"task": task, "task_type": "CAUSAL_LM", "generations": 4, "answer": 20}
    simulated, really = both(llama, setting_of(None, fields))
    assert simulated.peak_bytes == pytest.approx(really.peak_bytes, rel=TOLERANCE)


def plan(task: Any, model: Any = None, **fields: Any) -> MemoryPlan:
    return simulate(model or llama(), lora(), **BATCH | {"task": task, "task_type": "CAUSAL_LM"} | fields)


def test_the_reference_of_dpo_is_the_base_and_costs_a_forward_pass() -> None:
    without, pairs = plan("orpo"), plan("dpo")
    assert pairs.at("load").total == without.at("load").total
    # The base alone, without what the adapter adds, which is much of so small a model.
    assert 1.5 < pairs.work["forward"].flops / without.work["forward"].flops < 2


@pytest.mark.slow
def test_a_deep_model_of_pairs_is_continued_from_two_shallow_ones() -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=9, vocab_size=200
    )
    for task in ("dpo", "grpo"):
        options: dict[str, Any] = {"generations": 2, "answer": 9}
        continued, whole = plan(task, config, **options), plan(task, config, whole=True, **options)
        assert [m.total for m in continued.snapshots] == [m.total for m in whole.snapshots]
        assert {p: w.flops for p, w in continued.work.items()} == {p: w.flops for p, w in whole.work.items()}


def test_drawn_answers_take_the_cache_of_all_of_them_at_once() -> None:
    short, long = (plan("grpo", generations=4, answer=answer, sequence=8) for answer in (80, 112))
    config = llama()
    one = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2  # keys and values in bf16
    grown = long.at("generation").parts.activations - short.at("generation").parts.activations
    assert grown == 4 * 32 * one
    assert any("estimate" in note for note in long.notes)
    assert long.work["generation"].flops > short.work["generation"].flops


def test_on_cuda_the_head_keeps_no_copies_of_its_logits() -> None:
    wide = tiny_model(vocab_size=60_000).config
    cpu, cuda = (plan("dpo", wide, device=device).at("forward").parts.loss for device in ("cpu", "cuda"))
    assert cuda < cpu / 2


@pytest.mark.parametrize(
    ("method", "task", "fields", "said"),
    [
        (lambda: slimtune.PromptTuningConfig(num_virtual_tokens=4), "dpo", {}, "choose a method inside of the layers"),
        (lora, "grpo", {"generations": 3, "answer": 20}, "whole groups of 3"),
        (lora, "grpo", {"generations": 4, "answer": 200}, "128 positions"),
        (lora, "dop", {}, "did you mean 'dpo'"),
        (lora, "grpo", {"generations": 1}, "generations"),
        (lora, None, {"answer": 0}, "answer"),
    ],
)
def test_what_can_not_be_is_refused(method: Any, task: Any, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        simulate(llama(), method(), **BATCH | {"task": task, "task_type": "CAUSAL_LM"} | fields)


def chosen(task: str) -> dict[str, Any]:
    prompt, good, bad = "two large lattes to go", "yes please, with oat milk", "no"
    if task == "kto":
        return {"prompt": prompt, "completion": good, "label": True}
    return {"prompt": prompt, "chosen": good, "rejected": bad}


def rows_of(task: str) -> list[dict[str, Any]]:
    if task == "text":
        return [{"prompt": "two large lattes to go", "completion": "yes please"}] * 8
    if task == "token-classification":
        return [{"tokens": ["two", "large", "lattes", "to", "go"], "tags": ["B-N", "O", "B-D", "O", "O"]}] * 8
    if task == "seq2seq":
        words, sizes = list(WORDS.items()), list(SIZES.items())
        return [{"prompt": f"{sizes[0][0]} {word}", "completion": said} for word, said in words + words[:2]]
    return [chosen(task)] * 7 + [chosen(task) | ({"label": False} if task == "kto" else {})]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("task", ["text", "token-classification", "seq2seq", "dpo", "kto", "orpo"])
def test_a_training_takes_what_was_planned_for_it(task: str, tmp_path: Path) -> None:
    """The loop of `slimtune train` itself, from a file of data."""
    path = write_lines(tmp_path / "rows.jsonl", *rows_of(task))
    torch.manual_seed(0)
    model: Any = t5() if task == "seq2seq" else tiny_model(hidden_size=128, intermediate_size=512)
    tokenizer = seq2seq_tokenizer(starts=False) if task == "seq2seq" else tiny_tokenizer()
    if task == "token-classification":
        model.config.num_labels, model.config.pad_token_id = 3, tokenizer.pad_token_id
        model = transformers.LlamaForTokenClassification(model.config)
    data = read(DataSettings(path), task)
    config = model.config
    planned = simulate(config, lora(data.task_type), **_like_the_data(path, tokenizer, task, data.task_type))
    really = _trained(model, tokenizer, data, task, tmp_path)
    # A real step also has the norms of gradients and what is logged.
    assert planned.peak_bytes == pytest.approx(really, rel=0.02)


def _like_the_data(path: Path, tokenizer: Any, task: str, task_type: str) -> dict[str, Any]:
    found = measure(path, tokenizer, task)
    preferred = {"task": task} if task in PREFERENCE_TASKS else {}
    # Of a pair, the shorter answer is filled up.
    return {"batch": 4, "sequence": found.lengths.longest, "answer": found.answer, "dtype": "float32", "device": "cpu",
            "task_type": task_type, "padded": task in ("dpo", "orpo"), **preferred}  # fmt: skip


def _trained(model: Any, tokenizer: Any, data: Any, task: str, folder: Path) -> int:
    """The most bytes that are live in three steps."""
    tracker = MemoryTracker()
    with tracker, (folder / "screen").open("w") as file:
        tracker.storages_of([*model.parameters(), *model.buffers()])
        model = slimtune.get_peft_model(model, lora(data.task_type))
        screen = Console(file=file)
        lesson = data.encode(model, tokenizer)
        kind = preference(task, model, tokenizer, PreferenceSettings(), 1024) if task in PREFERENCE_TASKS else None
        settings = TrainSettings(1e-3, max_steps=3, batch_size=4, save_minutes=0, share_prefixes=False)
        fine_tune(model, tokenizer, lesson.examples, settings, folder / "run", screen, objective=lesson.objective,
                  spec=kind)  # fmt: skip
    return peak_of(tracker)


def test_settings_say_how_many_tokens_are_drawn() -> None:
    assert Setting().drawn_tokens == 512
    assert Setting(answer=7).drawn_tokens == 7
