"""PiSSA, OLoRA and orthogonal starts: what peft trains, without changing the base."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import slimtune
from beside_peft import Case
from slimtune.errors import ConfigError
from slimtune.methods.lora.init import olora, orthogonal, pissa
from tensors import adapter_tensors, assert_all_near, assert_near, assert_same, copies, loss_of, predict, trainable
from zoo import GPT2, LLAMA, MIXTURE, QWEN2, Specimen

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def case(specimen: Specimen, init: str, **options: Any) -> Case:
    return Case("LoraConfig", specimen, specimen.options(r=4, lora_alpha=6, init_lora_weights=init, **options))


PATTERNS = {"rank_pattern": {"q_proj": 2, "up_proj": 3}, "alpha_pattern": {"v_proj": 3}}
MOVED = {
    "pissa": case(LLAMA, "pissa"),
    "pissa-iterated": case(LLAMA, "pissa_niter_8"),
    "pissa-biased": case(QWEN2, "pissa"),
    "pissa-conv1d": case(GPT2, "pissa"),
    "pissa-rslora": case(LLAMA, "pissa", use_rslora=True),
    "pissa-patterns": case(LLAMA, "pissa", **PATTERNS),
    "pissa-rslora-patterns": case(LLAMA, "pissa", use_rslora=True, **PATTERNS),
    "pissa-dora": case(LLAMA, "pissa", use_dora=True),
    "olora": case(LLAMA, "olora"),
    "olora-of-more-than-half-the-ranks": case(LLAMA, "olora", rank_pattern={"k_proj": 12}),
    "olora-biased": case(QWEN2, "OLoRA"),
}
each_case = pytest.mark.parametrize("case", MOVED.values(), ids=MOVED)


@each_case
def test_the_start_is_the_base_whose_weights_stay(case: Case) -> None:
    base = case.specimen.model()
    before = copies(dict(base.named_parameters()))
    expected = predict(base, case.batch())
    model = slimtune.get_peft_model(base, slimtune.LoraConfig(**copy.deepcopy(case.options)))
    assert torch.equal(predict(model, case.batch()), expected)
    assert_same({name: model.get_parameter(name) for name in before}, before)
    trained = trainable(model)
    assert all(tensor.any() for name, tensor in trained.items() if "lora_A" in name or "lora_B" in name)


@pytest.mark.parametrize("name", [name for name in MOVED if name != "pissa-iterated"])  # which draws at random
def test_three_steps_from_the_same_factors_agree(name: str) -> None:
    case = MOVED[name]
    found = []
    for library in (slimtune, peft):
        model = case.model(library).to(torch.float64).train()
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.01)
        start, gradients, losses = copies(by_name(model)), {}, []
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_of(model, case.batch(torch.float64))
            losses.append(loss.detach())
            loss.backward()
            gradients = gradients or gradients_of(model)
            optimizer.step()
        found.append((start, gradients, torch.stack(losses), predict(model, case.batch(torch.float64))))
    (start, gradients, losses, output), (their_start, their_gradients, their_losses, their_output) = found
    assert_all_near(start, their_start, 1e-5)
    assert_all_near(gradients, their_gradients, 1e-4)  # peft rounds the changed base to float32
    assert_near(losses, their_losses, 1e-5)
    assert_near(output, their_output, 1e-4)


def by_name(model: Any) -> dict[str, Tensor]:
    """Trained parameters by names that both libraries' can be given."""
    found: dict[str, Tensor] = {}
    for name, parameter in trainable(model).items():
        short = name.replace("base_model.model.", "").replace("deltas.default.", "")
        found[short.removesuffix(".weight").removesuffix(".default")] = parameter
    return found


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in by_name(model).items() if parameter.grad is not None}


def after_a_step(case: Case) -> Any:
    torch.manual_seed(11)
    model = case.model(slimtune).train()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.5)
    loss_of(model, case.batch()).backward()
    optimizer.step()
    return model.eval()


@each_case
def test_the_file_is_a_plain_lora_of_twice_the_rank_on_the_untouched_base(case: Case, tmp_path: Path) -> None:
    model = after_a_step(case)
    expected = predict(model, case.batch())
    assert (expected - predict(case.specimen.model(), case.batch())).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 8)
    assert config["lora_alpha"] == pytest.approx(6 * (math.sqrt(2) if config["use_rslora"] else 2))
    assert model.peft_config["default"].r == 4
    ours = slimtune.PeftModel.from_pretrained(case.specimen.model(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(case.specimen.model(), tmp_path)
    assert torch.equal(predict(ours, case.batch()), expected)
    assert_near(predict(theirs, case.batch()), expected)
    assert_same(adapter_tensors(slimtune, ours), adapter_tensors(slimtune, model))


@each_case
def test_a_run_is_taken_up_again_from_its_file(case: Case, tmp_path: Path) -> None:
    """As a Trainer resumes: the file goes into an adapter that started afresh."""
    model = after_a_step(case)
    model.save_pretrained(tmp_path)
    torch.manual_seed(12)
    resumed = case.model(slimtune)
    resumed.load_state_dict(load_file(tmp_path / "adapter_model.safetensors"))
    assert_near(predict(resumed, case.batch()), predict(model, case.batch()), 1e-5)
    assert_all_near(by_name(resumed), by_name(model), 1e-5)
    for one in (model, resumed):
        one.zero_grad()
        loss_of(one.train(), case.batch()).backward()
    assert_all_near(gradients_of(resumed), gradients_of(model), 1e-4)


@each_case
def test_merging_copying_and_switching(case: Case) -> None:
    model = after_a_step(case)
    expected, base = predict(model, case.batch()), predict(case.specimen.model(), case.batch())
    assert torch.equal(predict(copy.deepcopy(model), case.batch()), expected)
    with model.disable_adapter():
        assert torch.equal(predict(model, case.batch()), base)
    model.add_adapter("other", slimtune.LoraConfig(**copy.deepcopy(case.options)))
    assert torch.equal(predict(model, case.batch()), expected)
    assert_near(predict(model.merge_and_unload(), case.batch()), expected, 1e-4)


def test_in_bf16_the_start_is_the_base_and_small_steps_count() -> None:
    """The change is small beside the factors that it started from; it must not drown in their rounding."""
    models = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = LLAMA.model().to(torch.bfloat16).to(dtype)
        expected = predict(base, LLAMA.batch())
        model: Any = slimtune.get_peft_model(base, slimtune.LoraConfig(**LLAMA.options(r=4, init_lora_weights="pissa")))
        assert torch.equal(predict(model, LLAMA.batch()), expected)
        models[dtype] = model
    x = torch.randn(64, 32).bfloat16()
    changes = []
    for dtype, model in models.items():
        layer = model.model.layers[0].self_attn.q_proj
        delta = layer.deltas["default"]
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in (delta.lora_A, delta.lora_B):
                parameter.add_(1e-4 * torch.randn(parameter.shape))
            a, b = delta.pair
            changes.append((b.to(dtype).float() @ a.to(dtype).float()) @ x.float().t())
    assert_near(changes[1], changes[0], 0.02)


def test_combinations_are_plain_loras() -> None:
    model = after_a_step(MOVED["pissa"])
    expected = predict(model, LLAMA.batch())
    model.add_weighted_adapter(["default"], [1.0], "same", combination_type="cat")
    model.set_adapter("same")
    config: Any = model.peft_config["same"]
    assert (config.init_lora_weights, config.r) == (True, 8)
    assert_near(predict(model, LLAMA.batch()), expected)


def test_orthogonal_factors_are_drawn_as_peft_draws_them() -> None:
    tensors = []
    for library in (slimtune, peft):
        torch.manual_seed(4)
        config = library.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="orthogonal")
        tensors.append(adapter_tensors(library, library.get_peft_model(LLAMA.model(), config)))
    for ours, theirs in zip(*(sorted(t.items()) for t in tensors), strict=True):
        assert ours[0] == theirs[0]
        assert float(ours[1].std()) == pytest.approx(float(theirs[1].std()), rel=0.35)


def test_the_factors_are_the_papers() -> None:
    torch.manual_seed(0)
    weight = torch.randn(9, 12, dtype=torch.float64)
    u, sigma, vt = torch.linalg.svd(weight)
    a, b = pissa(weight, 3, 2.0)
    assert_near(2.0 * b @ a, u[:, :3] @ torch.diag(sigma[:3]) @ vt[:3], 1e-12)
    assert_near(a.norm(dim=1), b.norm(dim=0), 1e-12)
    a, b = pissa(weight, 3, 2.0, power_iterations=40)
    assert_near(2.0 * b @ a, u[:, :3] @ torch.diag(sigma[:3]) @ vt[:3], 1e-4)
    a, b = olora(weight, 9)
    assert_near(b @ a, weight, 1e-12)
    assert_near(b.t() @ b, torch.eye(9, dtype=torch.float64), 1e-12)
    a, b = orthogonal(weight, 6)
    assert (b @ a).abs().max() < 1e-6
    assert a.any()
    assert b.any()


MISTAKES: dict[str, tuple[Specimen, dict[str, Any], str]] = {
    "convolution": (MIXTURE, {"target_modules": ["conv2d"], "init_lora_weights": "pissa", "r": 2}, "linear layers"),
    "too-large-a-rank": (
        LLAMA,
        {"r": 17, "init_lora_weights": "olora", "target_modules": ["k_proj"]},
        "choose r <= 16",
    ),
    "odd-rank": (LLAMA, {"r": 3, "init_lora_weights": "orthogonal"}, "even rank"),
    "loftq": (LLAMA, {"init_lora_weights": "loftq"}, "isn.t in them; load the model with quantize"),
    "iterations": (LLAMA, {"init_lora_weights": "pissa_niter_many"}, "pissa_niter_"),
    "misspelt": (LLAMA, {"init_lora_weights": "pisa"}, "did you mean 'pissa'"),
    "eva-config": (LLAMA, {"eva_config": {}}, "init_lora_weights='eva'"),
    "rho": (LLAMA, {"init_lora_weights": "eva", "eva_config": {"rho": 0.5}}, "rho"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_changes_nothing(mistake: str) -> None:
    specimen, options, words = MISTAKES[mistake]
    model = specimen.model()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=words):
        slimtune.get_peft_model(model, slimtune.LoraConfig(**options))
    assert [type(module) for module in model.modules()] == classes


def trained_by_peft(case: Case, folder: Path) -> Any:
    """As `peft` writes it by default: the base changed, A and B alone in the file."""
    model = case.tuned(peft).eval()
    model.save_pretrained(folder)
    assert (
        json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"]
        == case.options["init_lora_weights"]
    )
    return model


@pytest.mark.parametrize("name", [name for name in MOVED if name != "pissa-iterated"])
def test_what_peft_trained_on_a_changed_base_is_read_on_the_untouched_one(name: str, tmp_path: Path) -> None:
    case = MOVED[name]
    theirs = predict(trained_by_peft(case, tmp_path / "theirs"), case.batch())
    base = case.specimen.model()
    before = copies(dict(base.named_parameters()))
    ours = slimtune.PeftModel.from_pretrained(base, tmp_path / "theirs")
    expected = predict(ours, case.batch())
    assert_near(expected, theirs, 1e-4)  # two large factors are subtracted
    assert_same({name: ours.get_parameter(name) for name in before}, before)
    ours.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["init_lora_weights"] is True
    for library in (slimtune, peft):
        again = library.PeftModel.from_pretrained(case.specimen.model(), tmp_path / "ours")
        assert_near(predict(again, case.batch()), expected)


def test_a_start_that_was_drawn_at_random_is_refused(tmp_path: Path) -> None:
    """`peft` draws another one when it loads, and answers otherwise than what it saved."""
    case = MOVED["pissa-iterated"]
    trained_by_peft(case, tmp_path)
    with pytest.raises(ConfigError, match="path_initial_model_for_weight_conversion"):
        slimtune.PeftModel.from_pretrained(case.specimen.model(), tmp_path)


def test_what_peft_trained_goes_on_from_where_it_was(tmp_path: Path) -> None:
    case = MOVED["pissa"]
    theirs = trained_by_peft(case, tmp_path).train()
    ours = slimtune.PeftModel.from_pretrained(case.specimen.model(), tmp_path, is_trainable=True).train()
    theirs = peft.PeftModel.from_pretrained(case.specimen.model(), tmp_path, is_trainable=True).train()
    for model in (ours, theirs):
        loss_of(model, case.batch()).backward()
    assert_all_near(gradients_of(ours), gradients_of(theirs), 1e-4)


def test_an_adapter_of_a_changed_base_takes_the_place_of_one_that_started_elsewhere(tmp_path: Path) -> None:
    case = MOVED["pissa"]
    theirs = trained_by_peft(case, tmp_path)
    plain = slimtune.LoraConfig(**{**case.options, "init_lora_weights": True})
    model = slimtune.get_peft_model(case.specimen.model(), plain)
    model.load_adapter(tmp_path, "default")
    assert_near(predict(model, case.batch()), predict(theirs, case.batch()), 1e-4)
