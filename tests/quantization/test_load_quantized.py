"""Quantized while loading: what transformers and bitsandbytes would hold, in less memory, and their files."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from bitsandbytes.functional import get_4bit_type, quantize_4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import slimtune
from slimtune import AutoPeftModelForCausalLM, LoraConfig, PeftModel, Quantization, get_peft_model
from slimtune.bases import claim
from slimtune.bases.bitsandbytes import PIECE, packed_4bit, packed_8bit
from slimtune.models.load import LoadOptions, load_model
from small_encoder import save_encoder
from small_text_model import save_base

pytestmark = pytest.mark.filterwarnings("ignore:.*quantiz")

MEASURED = """
import sys
import transformers.models.llama.modeling_llama
import slimtune, slimtune.quantization.load

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

before = status("VmRSS")
model, _ = slimtune.load(sys.argv[1], device="cpu", quantize="nf4")
print(status("VmHWM") - before, slimtune.parts(model).bytes)
"""
IDS = torch.arange(3, 43)[None]
ROUNDS = {"nf4": ("nf4", True), "nf4-single": ("nf4", False), "fp4": ("fp4", True), "int8": ("int8", True)}


def theirs(kind: str, double: bool, **others: Any) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **others)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32, **others,
    )  # fmt: skip


assert PIECE < 600 * 700  # the larger shape of the tests below is more than one


def logits(model: Any) -> Tensor:
    """As our product computes them."""
    claim(model)
    with torch.no_grad():
        return model.eval()(IDS).logits


def assert_same_storage(model: Any, other: Any) -> None:
    """Equal names, and tensors equal to the bit."""
    own, expected = model.state_dict(), other.state_dict()
    assert sorted(own) == sorted(expected)
    assert [name for name in own if not torch.equal(own[name], expected[name])] == []


def quantized_names(model: nn.Module) -> set[str]:
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("models") / "encoder")


class TestPacking:
    @pytest.mark.parametrize("blocksize", [32, 64, 4096])
    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    @pytest.mark.parametrize("double", [False, True])
    @pytest.mark.parametrize("shape", [(7, 9), (32, 48), (600, 700)])
    def test_4_bits_are_those_of_bitsandbytes(
        self, shape: tuple[int, int], double: bool, kind: str, blocksize: int
    ) -> None:
        weight = torch.randn(shape, dtype=torch.bfloat16)
        weight[0] = 0
        codes, state = quantize_4bit(weight, blocksize=blocksize, quant_type=kind, compress_statistics=double)
        packed: Any = packed_4bit(weight, blocksize, kind, double, torch.uint8)
        assert torch.equal(packed.data, codes)
        own, expected = packed.quant_state.as_dict(packed=True), state.as_dict(packed=True)
        assert sorted(own) == sorted(expected)
        assert all(torch.equal(own[name], expected[name]) for name in own)

    @pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    def test_values_between_two_codes_and_those_that_are_no_numbers(self, kind: str, storage: torch.dtype) -> None:
        values = get_4bit_type(kind, torch.device("cpu")).sort().values
        between = (values[1:] + values[:-1]) / 2
        near = [between.nextafter(torch.full_like(between, side)) for side in (-2.0, 2.0)]
        weight = torch.cat([torch.ones(3), values, between, *near]).view(1, 64)
        infinite = torch.randn(1, 64).index_fill(1, torch.tensor([5]), torch.inf)
        for each in (weight, infinite, torch.zeros(1, 64)):
            codes, state = quantize_4bit(each, blocksize=64, quant_type=kind, quant_storage=storage)
            packed: Any = packed_4bit(each, 64, kind, False, storage)
            assert packed.dtype == storage
            assert torch.equal(packed.data.view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(packed.quant_state.absmax, state.absmax)

    @pytest.mark.parametrize("shape", [(7, 9), (600, 700)])
    def test_8_bits_are_those_of_bitsandbytes(self, shape: tuple[int, int]) -> None:
        weight = torch.randn(shape, dtype=torch.bfloat16)
        expected: Any = bnb.nn.Int8Params(weight, requires_grad=False).to("cpu")
        packed: Any = packed_8bit(weight)
        assert torch.equal(packed.data, expected.data)
        assert torch.equal(packed.SCB, expected.SCB)


class TestLoading:
    @pytest.mark.parametrize("name", ROUNDS)
    def test_equals_transformers_with_bitsandbytes(self, name: str, base: Path) -> None:
        kind, double = ROUNDS[name]
        settings = Quantization(kind, double=double)
        model, tokenizer = slimtune.load(base, quantize=settings)
        expected = AutoModelForCausalLM.from_pretrained(base, quantization_config=theirs(kind, double))
        assert_same_storage(model, expected)
        assert tokenizer is not None
        assert model.config.quantization_config.to_dict() == expected.config.quantization_config.to_dict()
        layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert quantized_names(model) == layers
        assert torch.equal(logits(model), logits(expected))

    def test_the_name_is_short_for_the_settings(self, base: Path) -> None:
        assert_same_storage(
            slimtune.load(base, quantize="nf4")[0], slimtune.load(base, quantize=Quantization("nf4", double=True))[0]
        )

    def test_products_are_computed_in_the_dtype_of_the_model(self, base: Path) -> None:
        half = slimtune.load(base, dtype="bfloat16", quantize="nf4")[0]
        assert half.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
        assert half.config.quantization_config.bnb_4bit_compute_dtype == torch.bfloat16
        whole = slimtune.load(base, dtype="bfloat16", quantize=Quantization(compute_dtype="float32"))[0]
        assert whole.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
        assert whole.model.layers[0].mlp.up_proj.weight.quant_state.dtype == torch.bfloat16

    @pytest.mark.parametrize("blocksize", [32, 4096])
    def test_any_block_size_loads_in_transformers(self, blocksize: int, base: Path, tmp_path: Path) -> None:
        model = slimtune.load(base, quantize=Quantization("nf4", blocksize=blocksize))[0]
        assert model.model.layers[1].mlp.up_proj.weight.quant_state.blocksize == blocksize
        model.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert_same_storage(again, model)
        assert torch.equal(logits(again), logits(model))

    def test_a_block_that_does_not_divide_the_weights(self, tmp_path: Path) -> None:
        folder = save_base(tmp_path / "odd", hidden_size=36, intermediate_size=50, num_attention_heads=2)
        model = slimtune.load(folder, quantize="nf4")[0]
        layer = model.model.layers[0].mlp.up_proj
        plain = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj.weight
        assert plain.numel() % 64 != 0
        expanded = layer(torch.eye(36)).T
        scale = plain.abs().max()
        assert (expanded - plain).abs().max() < 0.16 * scale  # half of the widest gap between two codes
        assert (expanded - plain).abs().max() > 0.01 * scale

    def test_gpt2_whose_weights_lie_the_other_way(self, tmp_path: Path) -> None:
        config = transformers.GPT2Config(vocab_size=101, n_positions=64, n_embd=32, n_layer=1, n_head=2)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
        expected = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=theirs("nf4", True))
        assert_same_storage(slimtune.load(tmp_path, quantize="nf4")[0], expected)

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
    def test_the_peak_is_the_model_in_4_bits_and_about_a_layer(self, tmp_path: Path) -> None:
        shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
        config = transformers.LlamaConfig(vocab_size=1000, num_hidden_layers=6, dtype="bfloat16", **shape)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        weights = {name: torch.full(p.shape, 0.01, dtype=p.dtype) for name, p in empty.named_parameters()}
        sizes = [weight.nbytes for weight in weights.values()]
        empty.save_pretrained(tmp_path, state_dict=weights)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MEASURED, tmp_path], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        peak, stored = map(int, done.stdout.split())
        assert stored < 0.3 * sum(sizes)
        # Besides: what libraries load once they are needed.
        assert peak < stored + 3 * max(sizes) + 60e6 < sum(sizes)


class TestKept:
    def test_names_stay_as_they_are_beside_the_output_layer(self, base: Path, tmp_path: Path) -> None:
        model = slimtune.load(base, quantize=Quantization("nf4", keep=["o_proj", "down_proj"]))[0]
        assert quantized_names(model) == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
        model.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert_same_storage(again, model)

    def test_a_head_with_a_bias_stays_too(self, tmp_path: Path) -> None:
        config = transformers.BertConfig(
            vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        )
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
        model = slimtune.load(tmp_path, quantize="int8")[0]
        assert type(model.classifier) is nn.Linear
        assert "query" in quantized_names(model)

    def test_layers_that_the_folder_lacks_are_new_and_whole(self, tmp_path: Path) -> None:
        config = transformers.DistilBertConfig(vocab_size=16, dim=32, hidden_dim=64, n_layers=1, n_heads=2)
        transformers.DistilBertModel(config).save_pretrained(tmp_path / "base")
        save_encoder(tmp_path / "tokenizer")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "base" / file).write_bytes((tmp_path / "tokenizer" / file).read_bytes())
        model, _ = load_model(
            str(tmp_path / "base"), "classification", LoadOptions(quantize="nf4"), labels=["bad", "good"]
        )
        assert type(model.pre_classifier) is nn.Linear
        assert 0.01 < model.pre_classifier.weight.std() < 0.03  # drawn, not whatever was in memory
        assert "q_lin" in quantized_names(model)
        model.save_pretrained(tmp_path / "saved")
        again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
        assert_same_storage(again, model)

    def test_a_config_of_transformers_means_what_it_means_there(self, base: Path) -> None:
        given = theirs("fp4", False, llm_int8_skip_modules=["q_proj", "lm_head"])
        asked = copy.deepcopy(given.to_dict())
        model = slimtune.load(base, quantize=given)[0]
        expected = AutoModelForCausalLM.from_pretrained(base, quantization_config=given)
        assert_same_storage(model, expected)
        assert "q_proj" not in quantized_names(model)
        assert given.to_dict() == asked


class TestFiles:
    @pytest.mark.parametrize("name", ROUNDS)
    def test_a_folder_of_transformers_loads_as_it_is(self, name: str, base: Path, tmp_path: Path) -> None:
        AutoModelForCausalLM.from_pretrained(base, quantization_config=theirs(*ROUNDS[name])).save_pretrained(tmp_path)
        expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path))
        assert torch.equal(logits(slimtune.load(tmp_path)[0]), expected)
        adopted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), LoraConfig(task_type="CAUSAL_LM"))
        assert torch.equal(logits(adopted), expected)

    @pytest.mark.parametrize("name", ROUNDS)
    def test_what_is_saved_after_use_loads_in_transformers(self, name: str, base: Path, tmp_path: Path) -> None:
        kind, double = ROUNDS[name]
        model, _ = slimtune.load(base, quantize=Quantization(kind, double=double), dtype="bfloat16")
        fresh = copy.deepcopy(model.state_dict())
        model.generate(IDS, max_new_tokens=3, do_sample=False)
        adopted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
        adopted(input_ids=IDS, labels=IDS).loss.backward()
        before = logits(adopted.unload())
        model.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        stored = again.state_dict()
        assert sorted(stored) == sorted(fresh)
        assert [key for key in fresh if not torch.equal(stored[key], fresh[key])] == []
        assert torch.equal(logits(again), before)

    def test_a_stored_one_can_be_saved_again(self, base: Path, tmp_path: Path) -> None:
        slimtune.load(base, quantize="nf4")[0].save_pretrained(tmp_path / "first")
        model = slimtune.load(tmp_path / "first")[0]
        model.save_pretrained(tmp_path / "second")
        assert_same_storage(AutoModelForCausalLM.from_pretrained(tmp_path / "second"), model)

    def test_an_adapter_brings_its_base_in_the_numbers_that_are_asked_for(self, base: Path, tmp_path: Path) -> None:
        model = get_peft_model(slimtune.load(base, quantize="nf4")[0], LoraConfig(task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        model.save_pretrained(tmp_path / "adapter")
        loaded, _ = slimtune.load(tmp_path / "adapter", quantize="nf4")
        assert isinstance(loaded, PeftModel)
        assert torch.equal(logits(loaded), logits(model))
        assert not torch.allclose(logits(slimtune.load(tmp_path / "adapter")[0]), logits(model), atol=1e-3)

    @pytest.mark.parametrize("kind", ["nf4", "int8"])
    def test_automatic_classes_quantize_through_transformers(self, kind: str, base: Path, tmp_path: Path) -> None:
        get_peft_model(slimtune.load(base)[0], LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path, quantization_config=theirs(kind, True))
        assert torch.equal(logits(loaded), logits(slimtune.load(base, quantize=kind)[0]))
        assert slimtune.parts(loaded).rows[kind].modules == {"linear layer": 14}

    def test_an_encoder_for_features(self, encoder: Path) -> None:
        model, _ = load_model(str(encoder), "features", LoadOptions(quantize="nf4"))
        assert "query" in quantized_names(model)
