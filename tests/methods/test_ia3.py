"""(IA)^3 where peft is no oracle: the paper's formula, one-dimensional convolutions, fields and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import slimtune
from kinds import FLOATING
from slimtune.errors import ConfigError, TargetError
from tensors import adapter_gradients, adapter_tensors, assert_near, randomize
from zoo import BERT, GPT2, LLAMA, MIXTURE

LAYERS = [kind for kind in FLOATING if "linear" in kind.name or "conv" in kind.name]
each_layer = pytest.mark.parametrize("kind", LAYERS, ids=repr)
each_side = pytest.mark.parametrize("in_front", [False, True], ids=["output", "input"])


def attach(kind: Any, in_front: bool, **options: Any) -> Any:
    names = ["site"] if in_front else []
    config = slimtune.IA3Config(target_modules=["site"], feedforward_modules=names, **options)
    return slimtune.get_peft_model(kind.host().double(), config)


@each_side
@each_layer
def test_output_gradient_and_merge_are_the_formula_s(kind: Any, in_front: bool) -> None:
    host, x = kind.host().double().requires_grad_(False), kind.input().double()
    model = randomize(slimtune, attach(kind, in_front))
    (stored,) = adapter_tensors(slimtune, model).values()
    vector = stored.flatten().clone().requires_grad_()
    channels = (-1, *(1,) * (x.ndim - 2)) if hasattr(host.site, "kernel_size") else (-1,)
    expected = host(x * vector.view(channels)) if in_front else host(x) * vector.view(channels)
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    y = model(x)
    y.backward(cotangent)
    (gradient,) = adapter_gradients(slimtune, model).values()
    assert_near(y, expected, 1e-12)
    assert_near(gradient.flatten(), vector.grad, 1e-10)
    if kind.name != "linear-with-own-forward":
        assert_near(model.merge_and_unload()(x), expected, 1e-10)


@each_side
def test_without_the_initialisation_the_vector_is_drawn(in_front: bool) -> None:
    model = attach(LAYERS[0], in_front, init_ia3_weights=False)
    (vector,) = adapter_tensors(slimtune, model).values()
    assert vector.std() > 0.1


@each_side
def test_a_16_bit_base_keeps_its_output_dtype_and_nothing_in_float32(in_front: bool) -> None:
    config = slimtune.IA3Config(target_modules=["site"], feedforward_modules=["site"] if in_front else [])
    model = slimtune.get_peft_model(LAYERS[0].host().bfloat16(), config).train()
    (vector,) = adapter_tensors(slimtune, model).values()
    assert vector.dtype == torch.float32
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(LAYERS[0].input().bfloat16().requires_grad_())
    assert y.dtype == torch.bfloat16
    assert {tensor.numel() for tensor in kept if tensor.dtype == torch.float32} == {vector.numel()}


def test_the_default_notes_what_it_found() -> None:
    found = {}
    for specimen in (LLAMA, GPT2, BERT):
        config = slimtune.get_peft_model(specimen.model(), slimtune.IA3Config()).peft_config["default"]
        found[specimen.name] = (config.target_modules, config.feedforward_modules)
    seconds = {"0.output.dense", "1.output.dense"}
    assert found == {
        "llama": ({"k_proj", "v_proj", "down_proj"}, {"down_proj"}),
        "gpt2": ({"c_attn", "mlp.c_proj"}, {"mlp.c_proj"}),
        "bert": ({"key", "value"} | seconds, seconds),
    }


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"target_modules": ["q_proj"], "feedforward_modules": ["k_proj"]}, ConfigError, "k_proj.*not among"),
        ({"target_modules": ".*[kq]_proj", "feedforward_modules": ["v_proj"]}, ConfigError, "v_proj.*none of"),
        ({"target_modules": ["embed_tokens"]}, TargetError, "linear and convolution"),
        ({"target_modules": ["norm"]}, TargetError, "linear and convolution"),
        ({"init_ia3_weights": "gaussian"}, ConfigError, "init_ia3_weights"),
        ({"feed_forward_modules": ["down_proj"]}, ConfigError, "did you mean 'feedforward_modules'"),
    ],
)
def test_mistakes_are_named_before_anything_is_changed(options: dict[str, Any], error: type, match: str) -> None:
    model = LLAMA.model()
    with pytest.raises(error, match=match):
        slimtune.get_peft_model(model, slimtune.IA3Config(**options))
    assert not isinstance(model, slimtune.PeftModel)


def test_a_model_without_such_layers_says_so() -> None:
    with pytest.raises(TargetError, match="name the modules in target_modules"):
        slimtune.get_peft_model(MIXTURE.model(), slimtune.IA3Config())


@pytest.mark.parametrize(
    "options",
    [{"combination_type": "cat"}, {"svd_clamp": 0.9}, {"svd_rank": 4}],
    ids=lambda options: next(iter(options)),
)
def test_what_a_sum_of_vectors_has_not_is_refused(options: dict[str, Any]) -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.IA3Config())
    model.add_adapter("other", slimtune.IA3Config())
    with pytest.raises(ConfigError):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "mixed", **options)
    assert list(model.peft_config) == ["default", "other"]


def test_adapters_that_scale_different_sides_do_not_add_up() -> None:
    model = attach(LAYERS[0], True)
    model.add_adapter("other", slimtune.IA3Config(target_modules=["site"], feedforward_modules=[]))
    with pytest.raises(ConfigError, match="shapes"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "mixed")
