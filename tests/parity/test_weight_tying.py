"""`ensure_weight_tying`: what peft stores of both ends of a tied weight, and that they stay one."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import slimtune
from slimtune.errors import ConfigError
from tensors import assert_near, loss_of, predict, trainable
from zoo import LLAMA, TIED_LLAMA

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CASES: dict[str, dict[str, Any]] = {
    "lora-on-the-embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora-on-the-head": {"target_modules": ["q_proj", "lm_head"]},
    "lora-on-both": {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"embed_tokens": 2, "lm_head": 2}},
    "the-embedding-whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "the-head-whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both-whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
}
each_case = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


def trained(library: ModuleType, options: dict[str, Any]) -> Any:
    """After a step, so that both ends have moved."""
    torch.manual_seed(7)
    config = library.LoraConfig(r=4, lora_alpha=6, ensure_weight_tying=True, **options)
    model = library.get_peft_model(TIED_LLAMA.model(), config)
    with torch.no_grad():
        for _, parameter in sorted(trainable(model).items()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@each_case
def test_files_go_both_ways(options: dict[str, Any], tmp_path: Path) -> None:
    batch = TIED_LLAMA.batch()
    for writer, reader in ((peft, slimtune), (slimtune, peft), (slimtune, slimtune)):
        folder = tmp_path / f"{writer.__name__}-{reader.__name__}"
        model = trained(writer, options)
        expected = predict(model, batch)
        assert (expected - predict(TIED_LLAMA.model(), batch)).abs().max() > 1e-3
        model.save_pretrained(folder)
        assert_near(predict(reader.PeftModel.from_pretrained(TIED_LLAMA.model(), folder), batch), expected)


@each_case
def test_the_files_hold_the_same_names_and_shapes(options: dict[str, Any], tmp_path: Path) -> None:
    shapes = []
    for library in (slimtune, peft):
        trained(library, options).save_pretrained(tmp_path / library.__name__, save_embedding_layers=False)
        stored = load_file(tmp_path / library.__name__ / "adapter_model.safetensors")
        shapes.append({name: tuple(tensor.shape) for name, tensor in stored.items() if "base_layer" not in name})
    assert shapes[0] == shapes[1]


@each_case
def test_both_ends_stay_one_while_they_learn_and_when_they_are_merged(options: dict[str, Any]) -> None:
    model = trained(slimtune, options).train()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, TIED_LLAMA.batch()).backward()
        optimizer.step()
    expected = predict(model.eval(), TIED_LLAMA.batch())
    merged = model.merge_and_unload()
    assert_near(merged.lm_head.weight, merged.model.embed_tokens.weight)
    assert (merged.lm_head.weight - TIED_LLAMA.model().lm_head.weight).abs().max() > 1e-3
    assert_near(predict(merged, TIED_LLAMA.batch()), expected)


def test_the_gradients_of_both_ends_are_added() -> None:
    """As by hand, with the factors put into both weights."""
    model = trained(slimtune, CASES["lora-on-the-embedding"]).to(torch.float64)
    own = trainable(model)
    loss_of(model, TIED_LLAMA.batch()).backward()
    delta = model.model.embed_tokens.deltas["default"]
    a, b = (factor.detach().clone().requires_grad_() for factor in delta.trained)
    weight = model.model.embed_tokens.weight + delta.scaling * (b @ a).t()
    plain = TIED_LLAMA.model().to(torch.float64)
    others = slimtune.get_peft_model(plain, slimtune.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in trainable(others).items():
            parameter.copy_(own[name])
    with torch.nn.utils.parametrize.cached():
        loss = torch.func.functional_call(
            others, {"model.embed_tokens.weight": weight, "lm_head.weight": weight}, (), TIED_LLAMA.batch()
        ).loss
    loss.backward()
    assert_near(delta.trained[0].grad, a.grad, 1e-6)
    assert_near(delta.trained[1].grad, b.grad, 1e-6)


def test_what_it_changes_nothing_of_is_said() -> None:
    for specimen, options in (
        (LLAMA, {"target_modules": ["embed_tokens"]}),
        (TIED_LLAMA, {"target_modules": ["q_proj"]}),
    ):
        with pytest.warns(UserWarning, match="changes nothing: no tied weight"):
            slimtune.get_peft_model(specimen.model(), slimtune.LoraConfig(ensure_weight_tying=True, **options))


def test_each_end_has_the_scale_that_peft_gives_it(tmp_path: Path) -> None:
    options = {"target_modules": ["embed_tokens"], "rank_pattern": {"embed_tokens": 2}}
    theirs = trained(peft, options)
    theirs.save_pretrained(tmp_path)
    ours = slimtune.PeftModel.from_pretrained(TIED_LLAMA.model(), tmp_path)
    assert_near(predict(ours, TIED_LLAMA.batch()), predict(theirs, TIED_LLAMA.batch()))
    with pytest.raises(ConfigError, match="one scale for both ends"):
        trained(slimtune, options)


def test_dora_has_no_tied_form() -> None:
    config = slimtune.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, use_dora=True)
    with pytest.raises(ConfigError, match="DoRA has no tied form"):
        slimtune.get_peft_model(TIED_LLAMA.model(), config)


def test_layers_that_are_not_replicated_are_those_that_are_there() -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(layer_replication=[[0, 1], [1, 2]]))
    assert torch.equal(predict(model, LLAMA.batch()), predict(LLAMA.model(), LLAMA.batch()))
    for other in ([[0, 2], [1, 2]], [[0, 1]], [[0, 10**12]], []):
        with pytest.raises(ConfigError, match="build that model first"):
            slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(layer_replication=other))
    for damaged in (3, [3], [[0]], [["0", "2"]], {"0": 2}):
        with pytest.raises(ConfigError, match="pairs \\[start, end\\]"):
            slimtune.LoraConfig(layer_replication=damaged)


def test_an_adapter_for_some_tokens_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="tokens behind an invocation alone"):
        slimtune.LoraConfig(alora_invocation_tokens=[5])
