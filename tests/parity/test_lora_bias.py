"""`lora_bias`: a bias of B that is trained with it, as in peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import slimtune
from beside_peft import Agreement, Case
from slimtune.errors import ConfigError, MergeError
from tensors import assert_near, predict, randomize
from zoo import GPT2, LLAMA, MIXTURE, QWEN2, Specimen

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def case(specimen: Specimen, *targets: str, **options: Any) -> Case:
    return Case(
        "LoraConfig", specimen, {"r": 4, "lora_alpha": 6, "lora_bias": True, "target_modules": [*targets], **options}
    )


WITH_BIAS = {
    "biased": case(QWEN2, "q_proj", "v_proj"),
    "conv1d": case(GPT2, "c_fc", "mlp.c_proj"),
    "convolution": case(MIXTURE, "conv2d", "shared"),
    "drawn": case(QWEN2, "q_proj", init_lora_weights=False),
}


class TestAgreement(Agreement):
    cases = {"without-a-bias": case(LLAMA, "q_proj", "down_proj"), **WITH_BIAS}
    merged = WITH_BIAS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_product_has_it(dtype: torch.dtype) -> None:
    tuned = case(LLAMA, "q_proj").tuned(slimtune).to(dtype).train()
    module = tuned.get_submodule("model.layers.0.self_attn.q_proj")
    delta, x = module.deltas["default"], torch.randn(40, 32, dtype=dtype)
    expected = torch.nn.functional.linear(x, module.weight) + delta.scaling * delta.low_rank(x.to(delta.lora_A.dtype))
    y = module(x)
    assert y.grad_fn.next_functions[0][0].name().startswith("_LoraLinear")
    assert_near(y.float(), expected.float(), 1e-5 if dtype == torch.float32 else 1e-2)
    y.float().sum().backward()
    assert_near(delta.lora_bias.grad, torch.full_like(delta.lora_bias, 40 * delta.scaling))


def test_a_layer_without_a_bias_has_no_place_for_it() -> None:
    with pytest.raises(MergeError, match="no bias to write it into"):
        case(LLAMA, "q_proj").tuned(slimtune).merge_and_unload()


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_biases_add_up_when_adapters_are_combined(how: str) -> None:
    tuned = case(LLAMA, "q_proj")
    model = tuned.tuned(slimtune)
    model.add_adapter("other", slimtune.LoraConfig(**tuned.options))
    randomize(slimtune, model, "other", seed=3)
    rank = {"svd_rank": 8} if how == "svd" else {}
    model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "both", how, **rank)
    layers = [model.get_submodule(f"model.layers.{i}.self_attn.q_proj").deltas for i in range(2)]
    for deltas in layers:
        expected = 0.7 * deltas["default"].scaling * deltas["default"].lora_bias
        expected = expected - 0.4 * deltas["other"].scaling * deltas["other"].lora_bias
        assert_near(deltas["both"].lora_bias, expected)
    model.add_adapter("plain", slimtune.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="with and without lora_bias"):
        model.add_weighted_adapter(["default", "plain"], [1, 1], "three", how, **rank)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "plain LoRA"),
    "start": ({"init_lora_weights": "pissa"}, "plain LoRA"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "is for layers"),
    "no-truth-value": ({"lora_bias": "yes"}, "lora_bias"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_has_no_such_form_is_refused(mistake: str) -> None:
    options, words = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=words):
        slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(**{"lora_bias": True, **options}))


def test_it_starts_at_the_base() -> None:
    model = case(LLAMA, "q_proj").model(slimtune)
    assert torch.equal(predict(model, LLAMA.batch()), predict(LLAMA.model(), LLAMA.batch()))
