"""LoRA on stacks of experts, which are parameters and no layers, is that of peft; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import slimtune
from slimtune.errors import ConfigError, TargetError
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
    relative_error,
    trainable,
)
from zoo import HIDDEN, LLAMA, VOCABULARY, Specimen, causal_batch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=4, **SIZES))


def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(num_experts=4, moe_intermediate_size=24, head_dim=8, **SIZES)
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss() -> nn.Module:
    """Its stacks lie the other way round: (experts, in, out)."""
    config = transformers.GptOssConfig(
        num_local_experts=4, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"], **SIZES
    )
    return transformers.GptOssForCausalLM(config)


MIXTRAL = Specimen("mixtral", mixtral, causal_batch)
SPECIMENS = (MIXTRAL, Specimen("qwen3-moe", qwen3_moe, causal_batch), Specimen("gpt-oss", gpt_oss, causal_batch))
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "two-of-one-module": {"target_parameters": EXPERTS},
    "one": {"target_parameters": ["experts.down_proj"]},
    "beside-modules": {"target_parameters": EXPERTS, "target_modules": ["q_proj", "o_proj"]},
    "ranks": {"target_parameters": EXPERTS, "rank_pattern": {"experts.down_proj": 2}, "use_rslora": True},
    "gaussian": {"target_parameters": EXPERTS, "init_lora_weights": "gaussian"},
}
each_specimen = pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
each_case = pytest.mark.parametrize("case", CASES)


def attach(library: ModuleType, specimen: Specimen, case: str, **options: Any) -> Any:
    # peft adds modules of its own to some models where none are named.
    config = {"r": 4, "lora_alpha": 6, "target_modules": [], **CASES[case], **options}
    torch.manual_seed(5)
    return library.get_peft_model(specimen.model(), library.LoraConfig(**config))


def load(library: ModuleType, specimen: Specimen, folder: Path) -> Any:
    return library.PeftModel.from_pretrained(specimen.model(), folder, is_trainable=True)


@each_case
@each_specimen
def test_files_go_both_ways(specimen: Specimen, case: str, tmp_path: Path) -> None:
    theirs = randomize(peft, attach(peft, specimen, case))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = predict(theirs, specimen.batch())
    assert relative_error(expected, predict(specimen.model(), specimen.batch())) > 1e-2
    ours = load(slimtune, specimen, tmp_path / "theirs")
    assert_near(predict(ours, specimen.batch()), expected)
    ours.save_pretrained(tmp_path / "ours")
    assert_near(predict(load(peft, specimen, tmp_path / "ours"), specimen.batch()), expected)
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert_same(*files)


@each_case
@each_specimen
def test_it_starts_as_peft_does(specimen: Specimen, case: str) -> None:
    """A is drawn from the same distribution, B is zero, and nothing is changed yet."""
    ours, theirs = attach(slimtune, specimen, case), attach(peft, specimen, case)
    mine, other = adapter_tensors(slimtune, ours), adapter_tensors(peft, theirs)
    assert {key: t.shape for key, t in mine.items()} == {key: t.shape for key, t in other.items()}
    for key, tensor in other.items():
        if "lora_B" in key:
            assert not mine[key].any()
            assert not tensor.any()
        else:
            assert 0.75 < mine[key].std() / tensor.std() < 1.33
    assert torch.equal(predict(ours, specimen.batch()), predict(specimen.model(), specimen.batch()))


@each_case
@each_specimen
def test_gradients_and_three_steps_agree(specimen: Specimen, case: str, tmp_path: Path) -> None:
    randomize(peft, attach(peft, specimen, case)).save_pretrained(tmp_path)
    found = []
    for library in (slimtune, peft):
        model = load(library, specimen, tmp_path).double().train()
        model.get_base_model().set_experts_implementation("eager")  # the grouped product takes no float64
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
        gradients: dict[str, Any] = {}
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, specimen.batch()).backward()
            gradients = gradients or copies(adapter_gradients(library, model))
            optimizer.step()
        found.append((gradients, copies(adapter_tensors(library, model))))
    (our_gradients, ours), (their_gradients, theirs) = found
    assert_all_near(our_gradients, their_gradients)
    assert_all_near(ours, theirs, 1e-6)


@each_case
@each_specimen
def test_merging_says_the_same_and_can_be_taken_back(specimen: Specimen, case: str) -> None:
    model = randomize(slimtune, attach(slimtune, specimen, case))
    unmerged = predict(model, specimen.batch())
    model.merge_adapter(safe_merge=True)
    assert_near(predict(model, specimen.batch()), unmerged)
    model.unmerge_adapter()
    assert torch.equal(predict(model, specimen.batch()), unmerged)
    merged = model.merge_and_unload()
    assert type(merged) is type(specimen.model())
    assert_near(predict(merged, specimen.batch()), unmerged)


@each_specimen
def test_the_formula_expert_by_expert(specimen: Specimen) -> None:
    model = randomize(slimtune, attach(slimtune, specimen, "one").double())
    site = model.model.layers[0].mlp.experts
    delta = site.deltas["default"]
    weight_E = delta.adapted("down_proj", site.down_proj)
    a, b = delta.lora_A["down_proj"], delta.lora_B["down_proj"]
    for expert in range(4):
        update_OI = 6 / 4 * b[:, expert::4] @ a[4 * expert : 4 * expert + 4]
        update = update_OI.T if specimen.name == "gpt-oss" else update_OI
        assert_near(weight_E[expert] - site.down_proj[expert], update, 1e-9)


def test_routers_and_weights_of_layers_are_parameters_too(tmp_path: Path) -> None:
    options = {"target_parameters": ["mlp.gate.weight", "q_proj.weight"], "target_modules": []}
    theirs = randomize(peft, peft.get_peft_model(MIXTRAL.model(), peft.LoraConfig(r=2, **options)))
    theirs.save_pretrained(tmp_path)
    ours = load(slimtune, MIXTRAL, tmp_path)
    expected = predict(theirs, MIXTRAL.batch())
    assert_near(predict(ours, MIXTRAL.batch()), expected)
    assert_near(predict(ours.merge_and_unload(), MIXTRAL.batch()), expected)


def test_two_adapters_add_up_as_in_peft(tmp_path: Path) -> None:
    predictions = []
    for library in (slimtune, peft):
        model = attach(library, MIXTRAL, "two-of-one-module")
        model.add_adapter("other", library.LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS))
        randomize(library, model, "default", seed=3)
        randomize(library, model, "other", seed=4)
        (model.base_model if library is peft else model).set_adapter(["default", "other"])
        predictions.append(predict(model, MIXTRAL.batch()))
    assert_near(*predictions)


def test_generation_agrees_token_by_token(tmp_path: Path) -> None:
    randomize(peft, attach(peft, MIXTRAL, "beside-modules")).save_pretrained(tmp_path)
    ids = MIXTRAL.batch()["input_ids"]
    ours, theirs = (
        load(library, MIXTRAL, tmp_path).eval().generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        for library in (slimtune, peft)
    )
    assert torch.equal(ours, theirs)


def test_the_adapter_of_a_16_bit_base_is_in_float32() -> None:
    model = slimtune.get_peft_model(
        MIXTRAL.model().bfloat16(), slimtune.LoraConfig(r=4, target_parameters=EXPERTS, target_modules=["q_proj"])
    )
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    randomize(slimtune, model)
    assert predict(model, MIXTRAL.batch()).dtype == torch.bfloat16
    loss_of(model.train(), MIXTRAL.batch()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainable(model).values())


def test_autograd_keeps_one_new_tensor_for_a_stack() -> None:
    """Beside the stand-in itself there are the factors, never an update of the stack's size."""
    model = attach(slimtune, MIXTRAL, "one")
    site = model.model.layers[0].mlp.experts
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        site.deltas["default"].adapted("down_proj", site.down_proj)
    assert max(kept) < site.down_proj.numel()


def test_without_named_modules_there_are_the_parameters_alone(tmp_path: Path) -> None:
    model = slimtune.get_peft_model(MIXTRAL.model(), slimtune.LoraConfig(r=4, target_parameters=EXPERTS))
    assert all(".mlp.experts." in name for name in trainable(model))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_parameters": ["experts.gate_up"]}, "did you mean 'experts.gate_up_proj'"),
        ({"target_parameters": ["nothing.like.it"]}, "which no parameter is called; parameters with three dimensions"),
        ({"target_parameters": EXPERTS, "lora_dropout": 0.1}, "neither lora_dropout nor"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]}, "two of target_modules"),
        ({"target_parameters": ["input_layernorm.weight"]}, "has 1 dimensions"),
        ({"target_parameters": ["embed_tokens.weight"]}, "name the module in target_modules"),
        ({"target_parameters": EXPERTS, "rank_pattern": {"experts.up": 2}}, "rank_pattern names 'experts.up'"),
    ],
)
def test_what_does_not_go_is_refused_before_anything_is_changed(options: dict[str, Any], says: str) -> None:
    base = MIXTRAL.model()
    with pytest.raises((ConfigError, TargetError), match=says):
        slimtune.get_peft_model(base, slimtune.LoraConfig(**options))
    assert not hasattr(base, "peft_config")


def test_a_rank_beyond_the_experts_matrices_is_taken_and_said() -> None:
    with pytest.warns(UserWarning, match="rank 25 is beyond a 32 x 24 matrix"):
        slimtune.get_peft_model(MIXTRAL.model(), slimtune.LoraConfig(target_parameters=EXPERTS, r=25))


def test_rows_of_one_batch_share_their_experts() -> None:
    model = attach(slimtune, MIXTRAL, "one").eval()
    model.add_adapter("other", slimtune.LoraConfig(r=2, target_parameters=EXPERTS))
    with pytest.raises(ConfigError, match="parameters that all rows of a batch share"):
        model(**MIXTRAL.batch(), adapter_names=["default", "other"])


def test_adapters_on_parameters_are_not_combined() -> None:
    model = attach(slimtune, MIXTRAL, "one")
    model.add_adapter("other", slimtune.LoraConfig(r=4, target_parameters=["experts.down_proj"]))
    with pytest.raises(ConfigError, match="can't be combined"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", "linear")
    assert list(model.peft_config) == ["default", "other"]


def test_a_model_without_experts_says_so() -> None:
    with pytest.raises(TargetError, match="with three dimensions are none"):
        slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(target_parameters=["experts"]))


@each_specimen
def test_gradient_checkpointing_has_the_same_gradients(specimen: Specimen) -> None:
    model = randomize(slimtune, attach(slimtune, specimen, "two-of-one-module")).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss_of(model, specimen.batch()).backward()
        gradients.append(copies(adapter_gradients(slimtune, model)))
    assert_all_near(*gradients)
