"""BitFit trains what training the biases themselves would, and says where there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimtune
from kinds import KINDS, Kind, ScaledLinear
from slimtune.errors import ConfigError, MergeError, TargetError
from tensors import (
    adapter_gradients,
    adapter_tensors,
    assert_all_near,
    assert_near,
    copies,
    loss_of,
    predict,
    randomize,
    trainable,
)
from zoo import BERT, GPT2, LLAMA, MIXTURE, QWEN2, T5, Specimen

BY_NAME = {kind.name: kind for kind in KINDS}
SITE = {"target_modules": ["site"]}


def tuned(specimen: Specimen, seed: int = 2, **options: Any) -> Any:
    return randomize(slimtune, slimtune.get_peft_model(specimen.model(), slimtune.BitFitConfig(**options)), seed=seed)


@pytest.mark.parametrize("name", ["linear", "gpt2-conv1d", "conv1d", "conv2d-grouped", "conv3d"])
def test_the_output_is_the_base_s_and_b(name: str) -> None:
    kind = BY_NAME[name]
    host, x = kind.host().double(), kind.input().double()
    expected = host(x)
    model = randomize(slimtune, slimtune.get_peft_model(host, slimtune.BitFitConfig(**SITE)))
    (b,) = adapter_tensors(slimtune, model).values()
    channels = (-1, *(1,) * (x.ndim - 2)) if "conv" in name and name != "gpt2-conv1d" else (-1,)
    assert_near(model(x), expected + b.view(channels), 1e-12)


def test_behind_a_forward_of_one_s_own_it_is_the_bias_all_the_same() -> None:
    torch.manual_seed(0)
    site, x = ScaledLinear(5, 3).double(), torch.randn(4, 5, dtype=torch.float64)
    weight, bias = site.weight.detach().clone(), site.bias.detach().clone()
    model = slimtune.get_peft_model(nn.ModuleDict({"site": site}), slimtune.BitFitConfig(**SITE))
    randomize(slimtune, model)
    (b,) = adapter_tensors(slimtune, model).values()
    expected = 2 * torch.tanh(F.linear(x, weight, bias + b))
    assert_near(model["site"](x), expected, 1e-12)
    assert_near(model.merge_and_unload()["site"](x), expected, 1e-12)


@pytest.mark.parametrize("specimen", [GPT2, QWEN2, MIXTURE], ids=lambda specimen: specimen.name)
def test_adam_takes_the_steps_that_it_takes_on_the_biases(specimen: Specimen) -> None:
    model = slimtune.get_peft_model(specimen.model(), slimtune.BitFitConfig()).double().train()
    plain = specimen.model().double().train()
    biases = {name: p for name, p in plain.named_parameters() if name.endswith("bias")}
    plain.requires_grad_(False)
    for parameter in biases.values():
        parameter.requires_grad = True
    for trained, parameters in ((model, trainable(model).values()), (plain, biases.values())):
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(trained, specimen.batch()).backward()
            optimizer.step()
    assert len(trainable(model)) == len(biases)
    merged = dict(model.merge_and_unload().named_parameters())
    # Causal models compute their loss in float32, and Adam divides by gradients that are all but zero.
    assert_all_near({name: merged[name] for name in biases}, biases, 1e-5)


def test_normalisations_have_their_biases_tuned_too() -> None:
    names = adapter_tensors(slimtune, tuned(GPT2))
    assert "base_model.model.transformer.ln_f.bitfit_bias" in names
    assert sum(".ln_1." in name for name in names) == 2


def test_new_heads_are_trained_whole() -> None:
    names = {name for name in trainable(tuned(BERT)) if name.startswith("classifier")}
    assert names == {f"classifier.deltas.default.whole.{part}" for part in ("weight", "bias")}


GIVEN = [("linear-without-bias", (1, 1, 7)), ("conv1d-strided", (1, 8, 1))]


@pytest.mark.parametrize(("name", "shape"), GIVEN)
def test_a_layer_without_a_bias_is_given_one(name: str, shape: tuple[int, ...]) -> None:
    kind = BY_NAME[name]
    host, x = kind.host().double(), kind.input().double()
    expected = host(x)
    model = slimtune.get_peft_model(host, slimtune.BitFitConfig(add_bias=True, **SITE))
    assert torch.equal(model(x), expected)
    randomize(slimtune, model)
    (b,) = adapter_tensors(slimtune, model).values()
    y = model(x)
    assert_near(y, expected + b.view(shape), 1e-12)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    (gradient,) = adapter_gradients(slimtune, model).values()
    assert_near(gradient, cotangent.sum([d for d in range(y.ndim) if shape[d] == 1]), 1e-12)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    with pytest.raises(MergeError, match="no place for a bias"):
        model.merge_adapter()
    assert torch.equal(model(x), y)
    assert model.unload().site.bias is None


@pytest.mark.parametrize("specimen", [LLAMA, T5], ids=lambda specimen: specimen.name)
def test_a_model_without_biases_is_refused_with_the_way_out(specimen: Specimen) -> None:
    model = specimen.model()
    with pytest.raises(TargetError, match="add_bias=True"):
        slimtune.get_peft_model(model, slimtune.BitFitConfig())
    assert not isinstance(model, slimtune.PeftModel)
    given = slimtune.get_peft_model(model, slimtune.BitFitConfig(add_bias=True))
    linear = [name for name, m in specimen.model().named_modules() if isinstance(m, nn.Linear) and "head" not in name]
    assert len(trainable(given)) == len(linear)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_modules": ["q_proj"]}, "q_proj' has no bias to tune; set add_bias=True"),
        ({"target_modules": ["embed_tokens"], "add_bias": True}, "takes modules with a bias"),
        ({"target_modules": ["norm"], "add_bias": True}, "takes modules with a bias"),
    ],
)
def test_a_module_that_has_none_is_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(TargetError, match=match):
        slimtune.get_peft_model(LLAMA.model(), slimtune.BitFitConfig(**options))


def test_a_wrong_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="add_bias"):
        slimtune.BitFitConfig(add_bias="yes")


def two(specimen: Specimen = QWEN2, **options: Any) -> Any:
    model = tuned(specimen, **options)
    model.add_adapter("other", slimtune.BitFitConfig(**options))
    return randomize(slimtune, model, "other", seed=5)


@pytest.mark.parametrize(("specimen", "options"), [(QWEN2, {}), (LLAMA, {"add_bias": True})], ids=["own", "given"])
def test_a_weighted_sum_is_that_of_the_biases(specimen: Specimen, options: dict[str, Any]) -> None:
    model = two(specimen, **options)
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "mixed", combination_type="linear")
    one, other, mixed = (copies(adapter_tensors(slimtune, model, name)) for name in ("default", "other", "mixed"))
    assert_all_near(mixed, {name: 0.5 * one[name] - 2 * other[name] for name in one}, 1e-6)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter(["default", "other"])
    together = predict(model, specimen.batch())
    model.set_adapter("sum")
    assert_near(predict(model, specimen.batch()), together)


@pytest.mark.parametrize(
    "options",
    [{"combination_type": "cat"}, {"svd_clamp": 0.9}, {"svd_rank": 4}],
    ids=lambda options: next(iter(options)),
)
def test_what_a_sum_of_biases_has_not_is_refused(options: dict[str, Any]) -> None:
    model = two()
    with pytest.raises(ConfigError):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "mixed", **options)
    assert list(model.peft_config) == ["default", "other"]


def test_beside_lora_both_are_in_effect() -> None:
    model = tuned(QWEN2)
    model.add_adapter("low", slimtune.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    randomize(slimtune, model, "low", seed=5)
    model.set_adapter(["low", "default"])
    one = predict(model, QWEN2.batch())
    model.set_adapter(["default", "low"])
    assert_near(predict(model, QWEN2.batch()), one)
    loss_of(model.train(), QWEN2.batch()).backward()
    assert [name for name, p in trainable(model).items() if p.grad is None] == []
    assert_near(predict(model.merge_and_unload(), QWEN2.batch()), one)


def test_a_16_bit_base_has_float32_biases_and_a_merge_changes_no_bit() -> None:
    model = slimtune.get_peft_model(QWEN2.model().to(torch.bfloat16), slimtune.BitFitConfig())
    randomize(slimtune, model)
    assert {tensor.dtype for tensor in adapter_tensors(slimtune, model).values()} == {torch.float32}
    unmerged: Tensor = predict(model, QWEN2.batch())
    assert unmerged.dtype == torch.bfloat16
    assert torch.equal(predict(model.merge_and_unload(), QWEN2.batch()), unmerged)


def kinds_with_a_bias() -> list[Kind]:
    return [kind for kind in KINDS if getattr(kind.build(), "bias", None) is not None]


@pytest.mark.parametrize("kind", kinds_with_a_bias(), ids=repr)
def test_it_takes_every_kind_that_has_a_bias(kind: Kind) -> None:
    model = slimtune.get_peft_model(kind.host(), slimtune.BitFitConfig())
    assert list(trainable(model)) == ["site.deltas.default.difference.bias"]
