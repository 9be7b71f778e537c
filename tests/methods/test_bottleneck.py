"""Bottleneck adapters are the papers' formulas: whole blocks written out in float64, and every placement on models."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimtune
from slimtune.errors import ConfigError, MergeError
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
    trainable,
)
from zoo import BERT, GEMMA3, GPT2, GPT_NEOX, LAYERS, LLAMA, QWEN2, T5, VIT, Specimen

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
SPECIMENS = (LLAMA, QWEN2, GPT2, GPT_NEOX, GEMMA3, BERT, T5, VIT)
EXACT = 1e-12
OUTPUTS = {
    "llama": ("o_proj", "down_proj"), "qwen2": ("o_proj", "down_proj"), "gemma3": ("o_proj", "down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"), "gpt-neox": ("attention.dense", "dense_4h_to_h"),
    "bert": ("attention.output.dense", "output.dense"), "t5": ("Attention.o", "DenseReluDense.wo"),
    "vit": ("o_proj", "fc2"),
}  # fmt: skip
FEED_FORWARDS = {
    "gate_proj": "down_proj", "fc1": "fc2", "c_fc": "c_proj", "dense_h_to_4h": "dense_4h_to_h", "wi": "wo",
    "intermediate.dense": "output.dense",
}  # fmt: skip
each_placement = pytest.mark.parametrize("placement", PLACEMENTS)
each_specimen = pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)


def tuned(specimen: Specimen, placement: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = slimtune.BottleneckConfig(placement=placement, **{"reduction_factor": 4, **options})
    return randomize(slimtune, slimtune.get_peft_model(specimen.model().to(dtype), config)).eval()


class Written:
    """f(h) = s * (act(h A^T + a) B^T + b) for the modules of one model, from the names on disk."""

    def __init__(self, model: nn.Module, act: Callable[[Tensor], Tensor], scaling: float = 1.0) -> None:
        self.tensors = adapter_tensors(slimtune, model)
        self.act, self.scaling = act, scaling

    def __call__(self, path: str, h: Tensor) -> Tensor:
        down, up = f"base_model.model.{path}.adapter_down", f"base_model.model.{path}.adapter_up"
        if f"{up}.weight" not in self.tensors:
            return torch.zeros_like(h)
        own = self.tensors
        z = self.act(h @ own[f"{down}.weight"].t() + own[f"{down}.bias"])
        return self.scaling * (z @ own[f"{up}.weight"].t() + own[f"{up}.bias"])


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over (batch, heads, tokens, d), heads put side by side again."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf, dtype=q.dtype).triu(1)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def plain(module: Any, x: Tensor) -> Tensor:
    """The frozen linear layer alone."""
    return F.linear(x, module.weight, module.bias)


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


@each_placement
def test_a_post_norm_block_of_bert_is_the_equation(placement: str) -> None:
    model = tuned(BERT, placement, torch.float64, non_linearity="gelu", scaling=1.7)
    f = Written(model, F.gelu, 1.7)
    layer, path = model.bert.encoder.layer[0], "bert.encoder.layer.0"
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    own = layer.attention.self
    q, k, v = (heads(plain(projection, x), 4) for projection in (own.query, own.key, own.value))
    h = plain(layer.attention.output.dense, attention(q, k, v, causal=False))
    attended = layer.attention.output.LayerNorm(x + h + f(f"{path}.attention.output.dense", h))
    h = plain(layer.output.dense, F.gelu(plain(layer.intermediate.dense, attended)))
    read = attended if placement == "parallel" else h
    expected = layer.output.LayerNorm(attended + h + f(f"{path}.output.dense", read))
    found = layer(x)
    assert_near(found[0] if isinstance(found, tuple) else found, expected, EXACT)
    with model.disable_adapter():
        off = layer(x)
    assert not torch.allclose(off[0] if isinstance(off, tuple) else off, expected)


@each_placement
def test_a_pre_norm_block_of_llama_is_the_equation(placement: str) -> None:
    model = tuned(LLAMA, placement, torch.float64, non_linearity="tanh", scaling=0.5)
    f = Written(model, torch.tanh, 0.5)
    layer, path = model.model.layers[1], "model.layers.1"
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    cos, sin = model.model.rotary_emb(x, torch.arange(5)[None])
    own, normed = layer.self_attn, layer.input_layernorm(x)
    q, k, v = (
        heads(plain(projection, normed), count)
        for projection, count in ((own.q_proj, 4), (own.k_proj, 2), (own.v_proj, 2))
    )
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    h = plain(own.o_proj, attention(q, k, v, causal=True))
    attended = x + h + f(f"{path}.self_attn.o_proj", h)
    normed, mlp = layer.post_attention_layernorm(attended), layer.mlp
    h = plain(mlp.down_proj, F.silu(plain(mlp.gate_proj, normed)) * plain(mlp.up_proj, normed))
    expected = attended + h + f(f"{path}.mlp.down_proj", normed if placement == "parallel" else h)
    found = layer(x, position_embeddings=(cos, sin))
    assert_near(found[0] if isinstance(found, tuple) else found, expected, EXACT)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


@each_placement
@each_specimen
def test_adapters_sit_behind_the_projections_of_every_block(specimen: Specimen, placement: str) -> None:
    model = tuned(specimen, placement)
    names = {name.partition(".deltas.")[0] for name in trainable(model) if "adapter_up" in name}
    wanted = OUTPUTS[specimen.name] if placement == "houlsby" else OUTPUTS[specimen.name][1:]
    expected = {
        name
        for name, _ in specimen.model().named_modules()
        if name.endswith(wanted) and (placement == "houlsby" or not name.endswith("attention.output.dense"))
    }
    assert names == expected
    assert len(names) >= LAYERS * len(wanted)


@each_placement
@each_specimen
def test_the_gradients_are_those_of_the_equation(specimen: Specimen, placement: str) -> None:
    """Beside a copy of the model whose output projections are replaced by the formula, module by module."""
    model = tuned(specimen, placement, torch.float64, non_linearity="gelu", scaling=2.0)
    loss_of(model, specimen_batch(specimen)).backward()
    found = copies(adapter_gradients(slimtune, model))
    plain_model: Any = specimen.model().to(torch.float64).requires_grad_(False)
    f = Written(model, F.gelu, 2.0)
    f.tensors = {key: tensor.detach().clone().requires_grad_() for key, tensor in f.tensors.items()}
    new_heads = {k.removeprefix("base_model.model."): t for k, t in f.tensors.items() if ".adapter_" not in k}
    plain_model.load_state_dict({key: tensor.detach() for key, tensor in new_heads.items()}, strict=False)
    read: dict[str, Tensor] = {}
    for name, module in plain_model.named_modules():
        if f"base_model.model.{name}.adapter_up.weight" in f.tensors:
            module.register_forward_hook(lambda _, args, h, at=name: h + f(at, read[at] if read else h))
        for begin, end in FEED_FORWARDS.items():
            if placement == "parallel" and name.endswith(f".{begin}"):
                at = name.removesuffix(begin) + end
                module.register_forward_pre_hook(lambda _, args, at=at: read.update({at: args[0]}))
    loss_of(plain_model, specimen_batch(specimen)).backward()
    expected = {key: tensor.grad for key, tensor in f.tensors.items() if ".adapter_" in key}
    assert_all_near({key: found[key] for key in found if ".adapter_" in key}, expected, 1e-9)


def specimen_batch(specimen: Specimen) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in specimen.batch().items()}


@each_placement
@each_specimen
def test_a_new_adapter_is_the_identity_to_the_bit(specimen: Specimen, placement: str) -> None:
    expected = predict(specimen.model(), specimen.batch())
    model = slimtune.get_peft_model(specimen.model(), slimtune.BottleneckConfig(placement=placement))
    assert torch.equal(predict(model, specimen.batch()), expected)


@pytest.mark.parametrize(("init", "deviation"), [("bert", 0.02), ("houlsby", 0.01)])
def test_the_papers_initialisations_are_near_the_identity(init: str, deviation: float) -> None:
    torch.manual_seed(0)
    config = slimtune.BottleneckConfig(bottleneck_size=32, init_weights=init)
    model = slimtune.get_peft_model(LLAMA.model(), config)
    for key, tensor in adapter_tensors(slimtune, model).items():
        if key.endswith("bias"):
            assert not tensor.any()
        else:
            assert 0.8 * deviation < tensor.std() < 1.1 * deviation
            assert init == "bert" or tensor.abs().max() <= 0.02
    assert_near(predict(model, LLAMA.batch()), predict(LLAMA.model(), LLAMA.batch()), 0.05)


@pytest.mark.parametrize(("name", "function"), [("silu", F.silu), ("swish", F.silu), ("leakyrelu", F.leaky_relu)])
def test_activations_by_name(name: str, function: Any) -> None:
    model = slimtune.get_peft_model(nn.Sequential(nn.Linear(6, 4)), slimtune.BottleneckConfig(
        target_modules=["0"], bottleneck_size=3, non_linearity=name))  # fmt: skip
    randomize(slimtune, model)
    x = torch.randn(5, 6)
    h = plain(model[0], x)
    assert_near(model(x), h + Written(model, function)("0", h))


def test_a_learned_scale_starts_at_one_is_trained_and_stored(tmp_path: Path) -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.BottleneckConfig(scaling="learned"))
    scales = {key: t for key, t in adapter_tensors(slimtune, model).items() if key.endswith(".scaling")}
    assert [float(scale) for scale in scales.values()] == [1.0] * 2 * LAYERS
    randomize(slimtune, model)
    loss_of(model.train(), LLAMA.batch()).backward()
    gradients = adapter_gradients(slimtune, model)
    assert all(gradients[key].any() for key in scales)
    model.save_pretrained(tmp_path)
    reread = slimtune.PeftModel.from_pretrained(LLAMA.model(), tmp_path)
    assert reread.peft_config["default"].scaling == "learned"
    assert torch.equal(predict(reread, LLAMA.batch()), predict(model, LLAMA.batch()))


def test_a_learned_scale_is_the_scale() -> None:
    fixed, learned = (tuned(LLAMA, "houlsby", scaling=scaling) for scaling in (3.0, "learned"))
    tensors = copies(adapter_tensors(slimtune, fixed))
    scales = {key: torch.full((1,), 3.0) for key in adapter_tensors(slimtune, learned) if key.endswith(".scaling")}
    slimtune.set_peft_model_state_dict(learned, tensors | scales)
    assert_near(predict(learned, LLAMA.batch()), predict(fixed, LLAMA.batch()), 1e-6)


def test_dropout_is_on_the_bottleneck_and_in_training_alone() -> None:
    model = slimtune.get_peft_model(nn.Sequential(nn.Linear(6, 4)), slimtune.BottleneckConfig(
        target_modules=["0"], bottleneck_size=3, dropout=0.4))  # fmt: skip
    randomize(slimtune, model)
    x = torch.randn(50, 6)
    h = plain(model[0], x)
    assert_near(model.eval()(x), h + Written(model, F.relu)("0", h))
    torch.manual_seed(3)
    trained = model.train()(x)
    torch.manual_seed(3)
    assert_near(trained, h + Written(model, lambda z: F.dropout(F.relu(z), 0.4))("0", h))


@each_placement
@each_specimen
def test_saved_then_loaded_is_the_same(specimen: Specimen, placement: str, tmp_path: Path) -> None:
    model = tuned(specimen, placement, non_linearity="silu", scaling=2.0)
    model.save_pretrained(tmp_path)
    reread = slimtune.PeftModel.from_pretrained(specimen.model(), tmp_path)
    assert_same(adapter_tensors(slimtune, reread), adapter_tensors(slimtune, model))
    assert torch.equal(predict(reread, specimen.batch()), predict(model, specimen.batch()))


@each_placement
def test_it_can_not_be_merged_or_combined_and_coverage_says_so(placement: str) -> None:
    model = tuned(LLAMA, placement)
    expected = predict(model, LLAMA.batch())
    with pytest.raises(MergeError, match="can't be merged"):
        model.merge_adapter()
    assert torch.equal(predict(model, LLAMA.batch()), expected)
    model.add_adapter("other", slimtune.BottleneckConfig(placement=placement, reduction_factor=4))
    with pytest.raises(ConfigError, match="can't be combined"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", "linear")
    assert "can't be merged" in str(model.coverage())
    assert sum(row.trained for row in model.coverage().rows.values()) == LAYERS * (2 if placement == "houlsby" else 1)
    lora = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(r=2))
    assert "merged" not in str(lora.coverage())


@each_placement
def test_a_16_bit_base_keeps_its_dtype_and_autograd_no_wide_copy(placement: str) -> None:
    """A large activation in float32 would double what a step holds."""
    model = tuned(LLAMA, placement, torch.bfloat16).train()
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    module, kept = model.model.layers[0].mlp, []
    x = torch.randn(4, 64, 32, dtype=torch.bfloat16)

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert all(dtype == torch.bfloat16 for dtype, size in kept if size >= x.numel())
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in trainable(module).values())


def test_layers_can_be_chosen() -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.BottleneckConfig(layers_to_transform=[1]))
    assert {name.split(".")[2] for name in trainable(model)} == {"1"}
