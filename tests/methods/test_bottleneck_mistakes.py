"""What a bottleneck adapter refuses: one sentence, before the model is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import slimtune
from slimtune.errors import ConfigError, TargetError
from zoo import BERT, HIDDEN, LLAMA, MIXTURE


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"placement": "housby"}, r"placement must be one of .*found 'housby'; did you mean 'houlsby'\?"),
        ({"non_linearity": "gleu"}, r"non_linearity must be one of .*found 'gleu'; did you mean 'gelu'\?"),
        ({"init_weights": "zero"}, "init_weights must be one of"),
        ({"reduction_factor": 4, "bottleneck_size": 8}, "both set the width"),
        ({"reduction_factor": 0}, "reduction_factor must be positive, found 0"),
        ({"reduction_factor": "16"}, "reduction_factor must be a number"),
        ({"bottleneck_size": 0}, "bottleneck_size must be a whole number of at least 1, found 0"),
        ({"bottleneck_size": 2.5}, "bottleneck_size must be a whole number"),
        ({"scaling": "channel"}, r"scaling \(or 'learned'\) must be a number, found 'channel'"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), found 1.0"),
        ({"input_modules": ["fc1"]}, "goes with placement='parallel' and target_modules"),
        ({"placement": "parallel", "input_modules": ["fc1"]}, "goes with placement='parallel' and target_modules"),
        ({"placement": "parallel", "target_modules": ["fc1", "fc2"], "input_modules": "fc1"}, "is a list of names"),
        ({"reduction": 4}, r"has no field 'reduction'; did you mean 'reduction_factor'\?"),
        ({"layers_pattern": "layers"}, "give layers_to_transform as well"),
    ],
)
def test_fields(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        slimtune.BottleneckConfig(**fields)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


PARALLEL: dict[str, Any] = {"placement": "parallel"}


@pytest.mark.parametrize(
    ("build", "fields", "error", "sentence"),
    [
        (LLAMA.model, {"reduction_factor": 33}, ConfigError, f"leaves no unit of the {HIDDEN} of .*choose at most 32"),
        (MIXTURE.model, {}, TargetError, "attaches to attention_out, feed_forward_out, of which nothing is found"),
        (mixtral, {}, TargetError, "of which feed_forward_out isn't found in this model; name the modules"),
        (mixtral, {"placement": "pfeiffer"}, TargetError, "feed_forward_out, of which nothing is found"),
        (LLAMA.model, {"target_modules": ["embed_tokens"]}, TargetError, "an Embedding|a .*Embedding; it takes linear"),
        (LLAMA.model, {**PARALLEL, "target_modules": ["down_proj"]}, TargetError, "but none begins beside"),
        (LLAMA.model, {**PARALLEL, "target_modules": ["up_proj"]}, TargetError, "should end in one target module"),
        (LLAMA.model, {**PARALLEL, "target_modules": ["o_proj"]}, TargetError, "doesn't tell whether a feed-forward"),
        (BERT.model, {**PARALLEL, "target_modules": ["intermediate.dense", "layer.0.output.dense"]}, TargetError,
         "begins at 'bert.encoder.layer.1.intermediate.dense' should end in one"),
        (LLAMA.model, {**PARALLEL, "target_modules": ["q_proj", "k_proj"], "input_modules": ["q_proj"]}, TargetError,
         "equally wide; .* reads 32 and .* writes 16"),
        (LLAMA.model, {**PARALLEL, "target_modules": ["up_proj", "down_proj"], "input_modules": ["up_porj"]},
         TargetError, "input_modules names 'up_porj'.*did you mean 'up_proj'"),
    ],
)  # fmt: skip
def test_models(build: Any, fields: dict[str, Any], error: type[Exception], sentence: str) -> None:
    model = build()
    before, kind = {name: id(p) for name, p in model.named_parameters()}, type(model)
    with pytest.raises(error, match=sentence):
        slimtune.get_peft_model(model, slimtune.BottleneckConfig(**fields))
    assert type(model) is kind
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert all(p.requires_grad for p in model.parameters())
    assert not any(hasattr(module, "deltas") for module in model.modules())


def test_a_number_of_units_beyond_the_width_is_allowed() -> None:
    """A reduction factor below one widens, as in the library `adapters`."""
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.BottleneckConfig(reduction_factor=0.5))
    delta = model.model.layers[0].self_attn.o_proj.deltas["default"]
    assert delta.adapter_down.weight.shape == torch.Size([2 * HIDDEN, HIDDEN])
