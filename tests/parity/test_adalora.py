"""AdaLoRA is what it is in peft: the formula, the loss, and a whole schedule of falling ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

import slimtune
from beside_peft import Agreement, Case, check_generation
from slimtune.errors import ConfigError, TargetError
from slimtune.train.trainer import RankAllocation
from tensors import adapter_tensors, assert_all_near, assert_near, copies, loss_of, predict, randomize, trainable
from zoo import BERT, GPT2, LLAMA, LLAMA_LINEARS, MIXTURE, QWEN2, T5, VOCABULARY

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
# Without a task type peft leaves the regularisation out of the loss.
CAUSAL = {"target_modules": LLAMA_LINEARS, "task_type": "CAUSAL_LM"}
LINEARS = {**CAUSAL, "init_r": 6, "target_r": 3, "total_step": 20}
CASES = {
    "defaults": Case("AdaLoraConfig", LLAMA, {**CAUSAL, "total_step": 9}),
    "alpha": Case("AdaLoraConfig", LLAMA, {**LINEARS, "lora_alpha": 3}),
    "no-alpha": Case("AdaLoraConfig", LLAMA, {**LINEARS, "lora_alpha": 0}),
    "weak-regularisation": Case("AdaLoraConfig", LLAMA, {**LINEARS, "orth_reg_weight": 0.01}),
    "no-regularisation": Case("AdaLoraConfig", LLAMA, {**LINEARS, "orth_reg_weight": 0}),
    "layers": Case("AdaLoraConfig", LLAMA, {**LINEARS, "layers_to_transform": [1], "exclude_modules": ["q_proj"]}),
    "bias": Case("AdaLoraConfig", QWEN2, {**LINEARS, "bias": "lora_only"}),
    "conv1d": Case("AdaLoraConfig", GPT2, {**LINEARS, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "conv2d": Case("AdaLoraConfig", MIXTURE, {**LINEARS, "target_modules": ["conv2d", "shared"], "task_type": None}),
    "classifier": Case("AdaLoraConfig", BERT, {**LINEARS, "target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "encoder-decoder": Case(
        "AdaLoraConfig", T5, {**LINEARS, "target_modules": ["q", "wo"], "task_type": "SEQ_2_SEQ_LM"}
    ),
}
STEPS = 20
SCHEDULE = {**LINEARS, "target_modules": ["q_proj", "down_proj"], "tinit": 3, "tfinal": 5, "deltaT": 2}


class TestAgreement(Agreement):
    cases = CASES


def test_generation_agrees() -> None:
    check_generation("AdaLoraConfig", **LINEARS)


def train(library: ModuleType, case: Case, steps: int = STEPS) -> tuple[Any, list[float]]:
    """A schedule from the same start on the same data, a new batch each step, in float64."""
    model = case.tuned(library).to(torch.float64).train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=5e-3)
    losses = []
    for step in range(steps):
        ids = torch.randint(4, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(step))
        loss = loss_of(model, {"input_ids": ids, "labels": ids})
        loss.backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(float(loss))
    return model, losses


@pytest.mark.parametrize(
    "options",
    [SCHEDULE, {**SCHEDULE, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.5}, {**SCHEDULE, "target_r": 1}],
    ids=["phases", "falling-throughout", "far-down"],
)
def test_a_whole_schedule_ends_at_the_same_ranks_and_weights(options: dict[str, Any], tmp_path: Path) -> None:
    case = Case("AdaLoraConfig", LLAMA, options)
    (ours, our_losses), (theirs, their_losses) = train(slimtune, case), train(peft, case)
    assert our_losses == pytest.approx(their_losses, rel=1e-6)
    for library, model in ((slimtune, ours), (peft, theirs)):
        model.save_pretrained(tmp_path / library.__name__)
    kept, expected = ours.peft_config["default"].rank_pattern, theirs.peft_config["default"].rank_pattern
    assert kept == expected
    ranks = [sum(ranks) for ranks in kept.values()]
    assert len(set(ranks)) > 1 or options["target_r"] == 1, "ranks went where they are needed"
    assert_all_near(copies(adapter_tensors(slimtune, ours)), copies(adapter_tensors(peft, theirs)), 1e-6)


def test_pruned_adapters_are_stored_small_and_read_by_each_other(tmp_path: Path) -> None:
    case = Case("AdaLoraConfig", LLAMA, SCHEDULE)
    for library in (slimtune, peft):
        model, _ = train(library, case)
        model.save_pretrained(tmp_path / library.__name__)
        expected = predict(model, case.inputs())
        rows = {t.shape[0] for key, t in load_file(tmp_path / library.__name__ / "adapter_model.safetensors").items()
                if "lora_E" in key}  # fmt: skip
        assert max(rows) <= 6
        assert sum(t.numel() for t in adapter_tensors(library, model).values()) < sum(
            p.numel() for p in trainable(case.model(library)).values()
        )
        for reader in (slimtune, peft):
            read = reader.PeftModel.from_pretrained(LLAMA.model(), tmp_path / library.__name__).double()
            assert_near(predict(read, case.inputs()), expected)


def test_a_pruned_adapter_is_pruned_again_from_where_it_is(tmp_path: Path) -> None:
    model, _ = train(slimtune, Case("AdaLoraConfig", LLAMA, SCHEDULE))
    model.save_pretrained(tmp_path)
    again = slimtune.PeftModel.from_pretrained(LLAMA.model(), tmp_path, is_trainable=True)
    before = predict(again, LLAMA.batch())
    again.train()
    loss_of(again, LLAMA.batch()).backward()
    again.update_and_allocate(STEPS)
    assert torch.equal(predict(again, LLAMA.batch()), before), "nothing was left to prune"


def test_stored_tensors_go_back_into_a_model_whose_ranks_are_masked() -> None:
    model, _ = train(slimtune, Case("AdaLoraConfig", LLAMA, SCHEDULE))
    stored, expected = copies(adapter_tensors(slimtune, model)), predict(model, LLAMA.batch())
    randomize(slimtune, model)
    assert not torch.equal(predict(model, LLAMA.batch()), expected)
    slimtune.set_peft_model_state_dict(model, stored)
    assert_near(predict(model, LLAMA.batch()), expected, 1e-12)


def test_the_regularisation_is_the_mean_distance_from_orthogonal_vectors() -> None:
    losses = []
    for weight in (0.0, 0.25):
        model = Case("AdaLoraConfig", LLAMA, {**LINEARS, "orth_reg_weight": weight}).tuned(slimtune).train()
        losses.append(loss_of(model, LLAMA.batch()))
    distances = []
    for key, tensor in adapter_tensors(slimtune, model).items():
        if "lora_E" not in key:
            rows = tensor if "lora_A" in key else tensor.T
            distances.append((rows @ rows.T - torch.eye(6)).square().sum().sqrt())
    assert_near(losses[1] - losses[0], 0.25 * torch.stack(distances).mean(), 1e-4)
    assert_near(loss_of(model.eval(), LLAMA.batch()), losses[0], 1e-5)


def test_the_callback_runs_the_schedule_inside_of_transformers_trainer(tmp_path: Path) -> None:
    options = {**SCHEDULE, "total_step": None, "tinit": 1, "tfinal": 2, "deltaT": 1}
    model = Case("AdaLoraConfig", LLAMA, options).model(slimtune)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
    )
    ids = torch.arange(4, 20)
    rows = [{"input_ids": ids, "labels": ids}] * 16
    Trainer(model, arguments, train_dataset=rows, callbacks=[RankAllocation()]).train()  # pyright: ignore[reportArgumentType]
    config = model.peft_config["default"]
    assert config.total_step == 8
    assert sum(sum(ranks) for ranks in config.rank_pattern.values()) == 3 * len(config.rank_pattern)


def test_a_copy_keeps_its_own_regularisation() -> None:
    model = CASES["alpha"].tuned(slimtune).train()
    twin = copy.deepcopy(model)
    loss_of(twin, LLAMA.batch()).backward()
    assert all(p.grad is not None for p in trainable(twin).values())
    assert all(p.grad is None for p in trainable(model).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_r": 0}, "init_r must be a whole number of at least 1"),
        ({"target_r": 13}, "target_r must be at most init_r=12, found 13"),
        ({"tinit": 5, "tfinal": 5, "total_step": 10}, "leave none of 10 steps"),
        ({"total_step": 0}, "total_step must be a whole number of at least 1"),
        ({"beta1": 1.0}, r"beta1 must be a number in \[0, 1\)"),
        ({"orth_reg_weight": -1}, "orth_reg_weight must be a number"),
        ({"use_dora": True}, "the field 'use_dora' is set to True, which is not implemented here"),
        ({"r": 4}, "the field 'r' is set to 4"),
        ({"delta_t": 2}, "did you mean 'deltaT'"),
    ],
)
def test_bad_fields_are_refused_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        slimtune.AdaLoraConfig(**options)


def test_modules_that_it_has_no_form_for_are_refused() -> None:
    with pytest.raises(TargetError, match="a grouped convolution; exclude it"):
        slimtune.get_peft_model(MIXTURE.model(), slimtune.AdaLoraConfig(target_modules=["grouped"]))
    with pytest.raises(TargetError, match="AdaLoRA can't attach to 'embedding'"):
        slimtune.get_peft_model(MIXTURE.model(), slimtune.AdaLoraConfig(target_modules=["embedding"]))


def test_sharing_out_without_what_it_needs_is_refused() -> None:
    model = Case("AdaLoraConfig", LLAMA, {**LINEARS, "total_step": None}).model(slimtune)
    with pytest.raises(ConfigError, match="set it in AdaLoraConfig"):
        model.update_and_allocate(0)
    model = CASES["alpha"].model(slimtune)
    with pytest.raises(ConfigError, match="call it after backward"):
        model.update_and_allocate(0)
    with pytest.raises(ConfigError, match="before a step was observed"):
        model.update_and_allocate(20)
    lora = slimtune.get_peft_model(nn.Sequential(nn.Linear(3, 3)), slimtune.LoraConfig(r=1, target_modules=["0"]))
    with pytest.raises(ConfigError, match="LORA adapters keep their ranks"):
        lora.update_and_allocate(0)
