"""torchao's tensors as a base, beyond the laws of all bases: exact numbers, right gradients, files, peft beside."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerBlock, PerGroup, PerRow, PerTensor

import slimtune
from kinds import Host
from quantizers import INT4
from slimtune.bases import base_of, claim
from slimtune.bases.torchao import TensorLinear, beyond, expand, pack
from slimtune.errors import ConfigError, MergeError
from slimtune.quantization.config import TORCHAO_KINDS, torchao_settings
from tensors import (
    adapter_gradients,
    adapter_tensors,
    assert_all_near,
    assert_near,
    assert_same,
    loss_of,
    parts,
    predict,
    randomize,
    relative_error,
)
from zoo import LLAMA, LLAMA_LINEARS
from zoo import llama as tiny_llama

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHT_ONLY: dict[str, Any] = {
    "int8": Int8WeightOnlyConfig(),
    "int8-tensor": Int8WeightOnlyConfig(granularity=PerTensor()),
    "int8-groups": Int8WeightOnlyConfig(granularity=PerGroup(16)),
    "int4-rows": IntxWeightOnlyConfig(INT4, PerAxis(0)),
    "int4-groups": IntxWeightOnlyConfig(INT4, PerGroup(16)),
    "int4-zeros": IntxWeightOnlyConfig(INT4, PerGroup(32), MappingType.ASYMMETRIC),
    "int3": IntxWeightOnlyConfig(torch.int3, PerGroup(32)),  # pyright: ignore[reportAttributeAccessIssue]
}
ROUNDS_INPUTS: dict[str, Any] = {
    "w8a8": Int8DynamicActivationInt8WeightConfig(),
    "w4a8": Int8DynamicActivationIntxWeightConfig(weight_dtype=INT4, weight_granularity=PerGroup(32)),
}
each_weight_only = pytest.mark.parametrize("config", WEIGHT_ONLY.values(), ids=WEIGHT_ONLY.keys())
each_that_rounds = pytest.mark.parametrize("config", ROUNDS_INPUTS.values(), ids=ROUNDS_INPUTS.keys())
each_kind = pytest.mark.parametrize("kind", TORCHAO_KINDS)


def layer(config: Any, dtype: torch.dtype = torch.float32, bias: bool = True) -> Any:
    torch.manual_seed(0)
    made = nn.Linear(64, 48, bias, dtype=dtype)
    quantize_(made, config)
    return made


def wide() -> Any:
    """With widths that groups of 32 divide."""
    torch.manual_seed(0)
    return tiny_llama(hidden_size=64, intermediate_size=96).eval()


def llama(config: Any) -> Any:
    model = wide()
    quantize_(model, config, lambda module, path: isinstance(module, nn.Linear) and "lm_head" not in path)
    return model


class TestExpansion:
    @each_weight_only
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_it_is_torchaos_own_to_the_bit(self, config: Any, dtype: torch.dtype) -> None:
        weight = layer(config, dtype).weight
        found = expand(weight)
        assert type(found) is torch.Tensor
        assert found.dtype == dtype
        assert torch.equal(found, weight.dequantize())

    def test_blocks_may_have_rows(self) -> None:
        weight = Int8Tensor.from_hp(torch.randn(48, 64), PerBlock((16, 8)))
        assert torch.equal(expand(weight), weight.dequantize())

    def test_a_form_without_codes_of_its_own_is_left_to_torchao(self) -> None:
        weight = layer(Float8WeightOnlyConfig()).weight
        assert torch.equal(expand(weight), weight.dequantize())

    def test_a_factor_of_the_inputs_is_in_the_weight(self) -> None:
        """As SmoothQuant has it; torchao's own product is the oracle."""
        site = nn.Linear(64, 48)
        factor = torch.rand(64) + 0.5
        site.weight = nn.Parameter(
            Int8Tensor.from_hp(site.weight.detach() / factor, PerRow(), act_pre_scale=factor), requires_grad=False
        )
        x = torch.randn(5, 64)
        expected = site(x)
        claim(site)
        assert_near(site(x), expected)

    @each_weight_only
    def test_what_comes_from_a_weight_is_packed_as_torchao_did(self, config: Any) -> None:
        torch.manual_seed(0)
        original = nn.Linear(64, 48).weight.detach()
        like = layer(config).weight
        assert_same(parts({"weight": pack(original, like)}), parts({"weight": like.data}))

    def test_what_lies_beyond_the_scales_is_counted(self) -> None:
        for config in WEIGHT_ONLY.values():
            like = layer(config).weight
            weight_OI = expand(like)
            assert beyond(weight_OI, like) == 0
            assert beyond(weight_OI * 100, like) > 0.5 * weight_OI.numel()

    def test_a_form_that_cant_be_made_again_is_refused(self) -> None:
        with pytest.raises(MergeError, match="Float8Tensor of torchao"):
            pack(torch.randn(48, 64), layer(Float8WeightOnlyConfig()).weight)


class TestClaiming:
    def test_the_weight_is_the_very_same_and_stays_it(self) -> None:
        host = Host(layer(Int8WeightOnlyConfig()))
        weight, names = host.site.weight, list(host.state_dict())
        model = slimtune.get_peft_model(host, slimtune.LoraConfig(r=2, target_modules=["site"]))
        assert type(model.unload().site) is TensorLinear
        assert host.site.weight is weight
        assert list(host.state_dict()) == names
        assert "weight=Int8Tensor" in repr(host.site)

    def test_it_can_be_pickled_which_it_couldnt_be_before(self) -> None:
        site = layer(Int8WeightOnlyConfig())
        with pytest.raises(AttributeError):
            pickle.dumps(site)
        claim(site)
        x = torch.randn(3, 64)
        assert torch.equal(pickle.loads(pickle.dumps(site))(x), site(x))

    def test_a_subclass_with_its_own_forward_keeps_it(self) -> None:
        class Scaled(nn.Linear):
            def forward(self, input: torch.Tensor) -> torch.Tensor:
                return 2 * super().forward(input)

        site = Scaled(64, 48)
        quantize_(site, Int8WeightOnlyConfig())
        x = torch.randn(3, 64)
        expected = site(x)
        host = Host(site)
        model = slimtune.get_peft_model(host, slimtune.LoraConfig(r=2, target_modules=["site"]))
        assert torch.equal(model(x), expected)
        assert_near(base_of(host.site).weight(host.site), 2 * site.weight.dequantize())

    def test_a_layer_whose_codes_have_another_name_is_left_alone(self) -> None:
        host = Host(nn.Linear(4, 4))
        del host.site._parameters["weight"]
        host.site.register_buffer("weight_packed", torch.zeros(4, 1, dtype=torch.int32))
        claim(host)
        assert type(host.site) is nn.Linear

    def test_torchao_is_imported_with_such_a_model_alone(self) -> None:
        """In a process of its own: torchao takes seconds to import."""
        script = (
            "import sys, torch, slimtune\n"
            "slimtune.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), slimtune.LoraConfig(r=2))\n"
            "sys.exit('torchao' in sys.modules)"
        )
        subprocess.run([sys.executable, "-c", script], check=True)


class TestTraced:
    def adapted(self) -> Any:
        host = Host(layer(Int8WeightOnlyConfig()))
        return slimtune.get_peft_model(host, slimtune.LoraConfig(r=4, init_lora_weights=False, target_modules=["site"]))

    def test_it_compiles_into_one_graph(self) -> None:
        model = self.adapted()
        expected, compiled = (
            torch.randn(5, 64, requires_grad=True),
            torch.compile(model, backend="aot_eager", fullgraph=True),
        )
        found = expected.detach().clone().requires_grad_()
        for x, call in ((expected, model), (found, compiled)):
            call(x).square().sum().backward()
        assert_near(found.grad, expected.grad)

    def test_it_runs_where_memory_is_planned(self) -> None:
        with FakeTensorMode():
            model = self.adapted()
            y = model(torch.randn(5, 64, requires_grad=True))
            y.sum().backward()
        assert y.shape == (5, 48)
        assert model.site.deltas["default"].lora_A.grad is not None


class TestGradients:
    @each_that_rounds
    def test_torchao_loses_them_where_it_rounds_inputs_and_here_they_are_those_of_the_weight(self, config: Any) -> None:
        site = layer(config)
        weight_OI = expand(site.weight)
        x = torch.randn(5, 64, requires_grad=True)
        site(x).sum().backward()
        assert x.grad is None
        claim(site)
        site(x).sum().backward()
        assert_near(x.grad, weight_OI.sum(0).expand(5, 64))

    @each_that_rounds
    def test_every_delta_learns(self, config: Any) -> None:
        model = slimtune.get_peft_model(llama(config), slimtune.LoraConfig(r=4, target_modules=LLAMA_LINEARS))
        model.train()
        loss_of(model, LLAMA.batch()).backward()
        ups = [gradient for name, gradient in adapter_gradients(slimtune, model).items() if "lora_B" in name]
        assert len(ups) == 14
        assert all(gradient.any() for gradient in ups)

    @each_that_rounds
    def test_the_output_is_that_of_unrounded_inputs(self, config: Any) -> None:
        model = llama(config)
        before = predict(model, LLAMA.batch())
        claim(model)
        assert 0 < relative_error(predict(model, LLAMA.batch()), before) < 0.05


class TestBesidePeft:
    """Same base, same adapter; peft runs torchao's own product."""

    @pytest.mark.parametrize("name", ["int8", "int8-groups", "int4-groups", "int4-zeros"])
    @pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
    def test_forward_and_gradients_agree(self, name: str, use_dora: bool) -> None:
        options = {"r": 4, "lora_alpha": 8, "use_dora": use_dora, "target_modules": LLAMA_LINEARS}
        models = [
            randomize(library, library.get_peft_model(llama(WEIGHT_ONLY[name]), library.LoraConfig(**options)))
            for library in (slimtune, peft)
        ]
        ours, its = (adapter_tensors(library, model) for library, model in zip((slimtune, peft), models, strict=True))
        assert_same(ours, its)
        batch = LLAMA.batch()
        assert_near(*(predict(model, batch) for model in models))
        for model in models:
            loss_of(model, batch).backward()
        ours, its = (adapter_gradients(library, m) for library, m in zip((slimtune, peft), models, strict=True))
        assert ours
        assert_all_near(ours, its, 1e-4)


@each_kind
class TestThroughTransformers:
    """`TorchAoConfig` as `settings` makes it."""

    @pytest.fixture
    def model(self, kind: str, tmp_path: Path) -> Any:
        wide().save_pretrained(tmp_path)
        return self.read(tmp_path, quantization_config=torchao_settings(kind))

    @staticmethod
    def read(folder: Path, **options: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)

    def test_base_and_adapter_are_written_and_read_apart(self, model: Any, tmp_path: Path) -> None:
        batch = LLAMA.batch()
        base = predict(model, batch)
        tuned = randomize(slimtune, slimtune.get_peft_model(model, slimtune.LoraConfig(r=4)))
        expected = predict(tuned, batch)
        tuned.save_pretrained(tmp_path / "adapter")
        tuned.unload().save_pretrained(tmp_path / "base")
        again = self.read(tmp_path / "base")
        assert torch.equal(predict(again, batch), base)
        assert torch.equal(predict(slimtune.PeftModel.from_pretrained(again, tmp_path / "adapter"), batch), expected)

    def test_merged_it_is_a_plain_model(self, model: Any, tmp_path: Path) -> None:
        tuned = randomize(slimtune, slimtune.get_peft_model(model, slimtune.LoraConfig(r=4)))
        expected = predict(tuned, LLAMA.batch())
        merged = tuned.merge_and_unload()
        assert {type(module) for module in merged.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
        merged.save_pretrained(tmp_path / "merged")
        assert_near(predict(self.read(tmp_path / "merged"), LLAMA.batch()), expected)


def test_another_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="int8-torchao, int4-torchao, found 'int8-torcho'; did you mean"):
        torchao_settings("int8-torcho")


@each_kind
def test_load_quantizes_by_name_and_claims(kind: str, tmp_path: Path) -> None:
    wide().save_pretrained(tmp_path / "base")
    model, _ = slimtune.load(tmp_path / "base", dtype="float32", device="cpu", quantize=kind)
    layers = [module for name, module in model.named_modules() if name.endswith("_proj")]
    assert layers
    assert all(type(layer) is TensorLinear for layer in layers)
    model.save_pretrained(tmp_path / "stored")
    with pytest.raises(ConfigError, match="is quantized already"):
        slimtune.load(tmp_path / "stored", quantize=kind)


def test_a_width_that_the_groups_do_not_divide_is_named(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="torchao can't quantize"):
        slimtune.load(tmp_path, device="cpu", quantize="int4-torchao")
