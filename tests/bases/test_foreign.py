"""Linear layers that other libraries quantized, known by their looks: their own forward, and every method around it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import hypothesis.strategies as st
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from hypothesis import given
from torch import Tensor, nn
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
from transformers.integrations.bitnet import BitLinear
from transformers.integrations.gemma_quant import QuantizedLinear

import slimtune
from kinds import Host
from slimtune.bases import base_of, claim
from slimtune.bases.foreign import ForeignLinear, is_foreign
from slimtune.errors import MergeError, TargetError
from slimtune.quantization.dequantize import dequantize
from tensors import adapter_tensors, assert_near, assert_same, predict, randomize, relative_error, trainable
from zoo import LLAMA, LLAMA_LINEARS, SPECIMENS, Specimen

IN, OUT = 512, 48
AT_SITE: dict[str, Any] = {"target_modules": ["site"]}


class Int8Linear(nn.Module):
    """As a library of one's own would have it: buffers alone, by the names that GPTQ's modules have."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        weight_OI = linear.weight.detach()
        scales_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (weight_OI / scales_O1).round().to(torch.int8))
        self.register_buffer("scales", scales_O1)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    @property
    def expanded(self) -> Tensor:
        return self.qweight * self.scales

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.expanded.to(x.dtype).t()
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Int8LinearThatCuts(Int8Linear):
    """Its product is a kernel that autograd doesn't know."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Int8LinearThatRaises(Int8Linear):
    """Its kernel has no backward, and says so."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
            return x @ weight_OI.t()

    def forward(self, x: Tensor) -> Tensor:
        product: Any = self.Product.apply(x, self.expanded)
        return product


def plain(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias)


def int8() -> Any:
    return Int8Linear(plain())


def of_gguf(kind: str) -> Callable[[], Any]:
    def build() -> Any:
        linear, of_kind = plain(), gguf.GGMLQuantizationType[kind]
        codes = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().numpy(), of_kind))
        made = GGUFLinear(IN, OUT, bias=True, compute_dtype=torch.float32)
        made.weight, made.bias = GGUFParameter(codes, quant_type=of_kind), linear.bias
        return made

    return build


def of_gemma(bits: int) -> Callable[[], Any]:
    def build() -> Any:
        made = QuantizedLinear(IN, OUT, bias=True, num_bits=bits)
        torch.manual_seed(0)
        made.weight.data.random_()
        nn.init.uniform_(made.weight_scale, 0.01, 0.02)
        return made

    return build


def of_gemma_that_rounds() -> Any:
    made = of_gemma(8)()
    made.input_activation_scale.data.fill_(0.05)
    return made


def of_bitnet() -> Any:
    made = BitLinear(IN, OUT, True, dtype=torch.float32)
    torch.manual_seed(0)
    made.weight.copy_(torch.randint(0, 170, made.weight.shape, dtype=torch.uint8))
    made.bias.normal_()
    return made


def of_torch() -> Any:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(plain()), {nn.Linear}, torch.qint8)[0]


def nf4_of_torchao() -> Any:
    """A tensor of torchao that no `dequantize` expands, in a plain `nn.Linear`."""
    made = plain()
    made.weight = nn.Parameter(to_nf4(made.weight.detach(), 64, 128), requires_grad=False)
    return made


EXACT: dict[str, Callable[[], Any]] = {
    "int8": int8,
    "gguf-q8": of_gguf("Q8_0"),
    "gguf-q4": of_gguf("Q4_0"),
    "gemma-2": of_gemma(2),
    "gemma-4": of_gemma(4),
    "gemma-8": of_gemma(8),
    "torchao-nf4": nf4_of_torchao,
}
"""Those that compute with their inputs as they are, and give them gradients."""
LOSSY: dict[str, Callable[[], Any]] = {
    "cuts": lambda: Int8LinearThatCuts(plain()),
    "raises": lambda: Int8LinearThatRaises(plain()),
    "torch": of_torch,
    "bitnet": of_bitnet,
    "gemma-rounding": of_gemma_that_rounds,
}
"""Those that give their inputs no gradient, or, as BitNet's, one that comes from the scale of the rounding alone."""
each_exact = pytest.mark.parametrize("build", EXACT.values(), ids=EXACT.keys())
each_lossy = pytest.mark.parametrize("build", LOSSY.values(), ids=LOSSY.keys())


@pytest.fixture(autouse=True)
def _uncompiled() -> Any:
    """BitNet's helpers are compiled, which takes long and changes nothing."""
    with torch.compiler.set_stance("force_eager"):
        yield


def claimed(build: Callable[[], Any]) -> tuple[Any, Any]:
    site = build()
    claim(site)
    return site, base_of(site)


def few_bits(model: Any, make: Callable[[nn.Linear], Any] = Int8Linear) -> Any:
    """The model with the linear layers of its blocks made by another library."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and ".layers." in path:
            model.set_submodule(path, make(layer))
    return model


class TestLooks:
    @pytest.mark.parametrize("build", [*EXACT.values(), *LOSSY.values()], ids=[*EXACT, *LOSSY])
    def test_it_is_known_by_what_it_is(self, build: Callable[[], Any]) -> None:
        site, base = claimed(build)
        assert isinstance(base, ForeignLinear)
        assert base.kind == "linear"
        assert base.features(site) == (IN, OUT)
        assert base.spec(site).shape == (OUT, IN)

    @pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
    def test_nothing_of_a_plain_model_is(self, specimen: Specimen) -> None:
        assert [path for path, module in specimen.model().named_modules() if is_foreign(module)] == []

    def test_neither_are_layers_of_floats_nor_what_is_made_of_layers(self) -> None:
        class LowRank(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.in_features, self.out_features = IN, OUT
                self.down, self.up = nn.Parameter(torch.randn(4, IN)), nn.Parameter(torch.randn(OUT, 4))

        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.in_features, self.out_features = IN, OUT
                self.register_buffer("steps", torch.zeros((), dtype=torch.long))
                self.inner = int8()

        lazy = nn.LazyLinear(OUT)
        bilinear = nn.Bilinear(4, 4, OUT)
        assert not any(is_foreign(module) for module in (LowRank(), Block(), lazy, bilinear, plain()))

    def test_all_linear_layers_of_the_blocks_find_them(self) -> None:
        model = slimtune.get_peft_model(few_bits(LLAMA.model()), slimtune.LoraConfig(r=2))
        assert {name.rpartition(".")[2] for name in model.peft_config["default"].target_modules} == set(LLAMA_LINEARS)


class TestWeight:
    @each_exact
    def test_it_is_what_the_forward_multiplies_with(self, build: Callable[[], Any]) -> None:
        site, base = claimed(build)
        x = torch.randn(5, IN)
        assert_near(x @ base.weight(site).t() + base.bias(site), site(x))

    def test_it_is_exact_and_a_large_bias_takes_nothing_away(self) -> None:
        site, base = claimed(int8)
        site.bias.fill_(1e4)
        assert torch.equal(base.weight(site), site.expanded)
        assert torch.equal(site.bias, torch.full((OUT,), 1e4))

    @pytest.mark.parametrize("build", [of_torch, of_bitnet, of_gemma_that_rounds])
    def test_where_inputs_are_rounded_it_is_as_near_as_that(self, build: Callable[[], Any]) -> None:
        site, base = claimed(build)
        x = torch.randn(5, IN)
        assert relative_error(x @ base.weight(site).t() + base.bias(site), site(x)) < 0.05


class TestGradient:
    @each_lossy
    def test_a_module_that_loses_it_is_refused_and_nothing_is_changed(self, build: Callable[[], Any]) -> None:
        host = Host(build())
        with pytest.raises(TargetError, match=r"gradients don't come through 'site', a .*; load the base in 16 bits"):
            slimtune.get_peft_model(host, slimtune.LoraConfig(r=2, **AT_SITE))
        assert type(host) is Host

    def test_so_is_one_above_the_first_delta_and_one_below_isnt(self) -> None:
        def model() -> nn.Sequential:
            return nn.Sequential(nn.Linear(IN, IN), Int8LinearThatCuts(plain()), nn.Linear(OUT, 4))

        with pytest.raises(TargetError, match="'1'"):
            slimtune.get_peft_model(model(), slimtune.LoraConfig(r=2, target_modules=["0"]))
        slimtune.get_peft_model(model(), slimtune.LoraConfig(r=2, target_modules=["2"]))

    def test_an_adapter_is_loaded_for_inference_all_the_same(self, tmp_path: Path) -> None:
        trained = slimtune.get_peft_model(Host(int8()), slimtune.LoraConfig(r=2, **AT_SITE))
        randomize(slimtune, trained).save_pretrained(tmp_path)
        model = slimtune.PeftModel.from_pretrained(Host(Int8LinearThatCuts(plain())), tmp_path)
        x = torch.randn(3, IN)
        assert torch.equal(model(x), trained(x))
        with pytest.raises(TargetError, match="gradients"):
            slimtune.PeftModel.from_pretrained(Host(Int8LinearThatCuts(plain())), tmp_path, is_trainable=True)

    def test_trying_draws_no_random_numbers(self) -> None:
        site, base = claimed(int8)
        state = torch.get_rng_state()
        assert not base.loses_gradient(site)
        assert torch.equal(torch.get_rng_state(), state)


CONFIGS: dict[str, Any] = {
    "lora": lambda **o: slimtune.LoraConfig(r=4, lora_alpha=8, **o),
    "lora-bias": lambda **o: slimtune.LoraConfig(r=4, bias="lora_only", **o),
    "dora": lambda **o: slimtune.LoraConfig(r=4, use_dora=True, **o),
    "pissa": lambda **o: slimtune.LoraConfig(r=4, init_lora_weights="pissa", **o),
    "adalora": lambda **o: slimtune.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **o),
    "vera": lambda **o: slimtune.VeraConfig(r=4, **o),
    "loha": lambda **o: slimtune.LoHaConfig(r=4, **o),
    "lokr": lambda **o: slimtune.LoKrConfig(r=4, **o),
    "ia3": lambda **o: slimtune.IA3Config(feedforward_modules=[], **o),
    "bottleneck": lambda **o: slimtune.BottleneckConfig(bottleneck_size=4, **o),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def expanded(site: Int8Linear) -> nn.Linear:
    made = nn.Linear(IN, OUT)
    made.load_state_dict({"weight": site.expanded, "bias": site.bias})
    return made


@each_config
class TestMethods:
    """On a foreign layer as on an `nn.Linear` of its weight."""

    def pair(self, config: Any) -> tuple[Any, Any]:
        hosts = Host(int8()), Host(expanded(int8()))
        models = [slimtune.get_peft_model(host, config(**AT_SITE)) for host in hosts]
        for model in models:
            randomize(slimtune, model)
        return models[0], models[1]

    def test_a_fresh_adapter_changes_nothing(self, config: Any) -> None:
        x = torch.randn(3, IN)
        expected = int8()(x)
        assert_near(slimtune.get_peft_model(Host(int8()), config(**AT_SITE))(x), expected)

    def test_output_and_gradients_are_those_on_the_expanded_weight(self, config: Any) -> None:
        x = torch.randn(3, IN)
        found = []
        for model in self.pair(config):
            own = x.clone().requires_grad_()
            y = model(own)
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
            found.append((y, own.grad, {name: p.grad for name, p in trainable(model).items()}))
        (y, gx, own), (y2, gx2, expected) = found
        assert_near(y, y2)
        assert_near(gx, gx2)
        assert own.keys() == expected.keys()
        for name, gradient in own.items():
            assert_near(gradient, expected[name], 1e-4, name)

    def test_detached_it_is_the_very_module_that_it_was(self, config: Any) -> None:
        host = Host(int8())
        objects = {name: id(tensor) for name, tensor in host.named_buffers()}
        x = torch.randn(3, IN)
        expected = host(x)
        randomize(slimtune, slimtune.get_peft_model(host, config(**AT_SITE))).unload()
        assert type(host.site) is Int8Linear
        assert {name: id(tensor) for name, tensor in host.named_buffers()} == objects
        assert torch.equal(host(x), expected)

    def test_it_is_stored_copied_and_pickled(self, config: Any, tmp_path: Path) -> None:
        model, x = self.pair(config)[0].eval(), torch.randn(3, IN)
        expected = model(x)
        model.save_pretrained(tmp_path)
        again = slimtune.PeftModel.from_pretrained(Host(int8()), tmp_path)
        assert_same(adapter_tensors(slimtune, again), adapter_tensors(slimtune, model))
        for twin in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), expected)

    def test_two_adapters_are_switched_between(self, config: Any) -> None:
        model, x = self.pair(config)[0].eval(), torch.randn(3, IN)
        first = model(x)
        model.add_adapter("other", config(**AT_SITE))
        randomize(slimtune, model, "other", seed=7)
        model.set_adapter("other")
        second = model(x)
        assert relative_error(first, second) > 1e-3
        model.set_adapter("default")
        assert torch.equal(model(x), first)
        with model.disable_adapter():
            assert torch.equal(model(x), int8()(x))


class TestWhatItCant:
    def test_a_merge_says_what_to_do_and_that_works(self) -> None:
        model = slimtune.get_peft_model(few_bits(LLAMA.model()), slimtune.LoraConfig(r=4))
        randomize(slimtune, model)
        stored, expected = adapter_tensors(slimtune, model), predict(model, LLAMA.batch())
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(MergeError, match="a Int8Linear has no place for a weight in floating point"):
                merge()
        assert torch.equal(predict(model, LLAMA.batch()), expected)
        plain_model = dequantize(model.unload())
        assert type(plain_model.model.layers[0].mlp.up_proj) is nn.Linear
        again = slimtune.get_peft_model(plain_model, slimtune.LoraConfig(r=4))
        slimtune.set_peft_model_state_dict(again, stored)
        assert_near(predict(again.merge_and_unload(), LLAMA.batch()), expected)

    @pytest.mark.parametrize("store", ["difference", "whole"])
    def test_its_weight_isnt_trained(self, store: str) -> None:
        with pytest.raises(TargetError, match="a QuantizedLinear keeps its weight in a form of its library"):
            slimtune.get_peft_model(Host(of_gemma(8)()), slimtune.FullConfig(store=store, **AT_SITE))


@given(st.integers(1, 600), st.integers(1, 9))
def test_the_weight_is_found_at_any_width(features_in: int, features_out: int) -> None:
    site = Int8Linear(nn.Linear(features_in, features_out))
    claim(site)
    assert torch.equal(base_of(site).weight(site), site.expanded)
