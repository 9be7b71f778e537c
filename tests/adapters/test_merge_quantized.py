"""Merging from a quantized base: floating weights for a while, or a plain model that saves, loads and trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers import BitsAndBytesConfig

import slimtune
from few_bits import (
    BY_NAME,
    INT8,
    NF4,
    base_state,
    biased,
    each_config,
    each_quantizer,
    in_codes,
    loaded,
    storage,
    tuned,
    wide,
)
from kinds import NEEDED, folds
from quantizers import Quantizer
from slimtune import dequantize
from slimtune.bases import claim
from slimtune.core.config import TargetedConfig, methods
from slimtune.errors import ConfigError, MergeError
from tensors import adapter_tensors, assert_near, assert_same, copies, predict, randomize, relative_error
from zoo import BERT, GPT2, LLAMA, T5, TIED_LLAMA, Specimen

pytestmark = pytest.mark.filterwarnings("ignore:.*(quantiz|4-bit|8-bit|Already found|embed)")


class TestApart:
    """Merged for a while: floating weights, and the very same codes afterwards."""

    @each_quantizer
    def test_merged_is_unmerged_and_taken_out_the_codes_are_the_very_same(self, quantizer: Quantizer) -> None:
        model = tuned(in_codes(quantizer))
        objects, state, batch = storage(model), base_state(model), LLAMA.batch()
        expected = predict(model, batch)
        for _ in range(2):
            model.merge_adapter(safe_merge=True)
            weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
            assert weight.dtype == torch.float32
            assert weight.shape == (48, 32)
            assert_near(predict(model, batch), expected)
            model.unmerge_adapter()
        assert storage(model) == objects
        assert_same(base_state(model), state)
        assert torch.equal(predict(model, batch), expected)

    @each_quantizer
    def test_the_base_shows_through_while_merged(self, quantizer: Quantizer) -> None:
        model = tuned(in_codes(quantizer))
        merged = predict(model, LLAMA.batch())
        model.merge_adapter()
        with model.disable_adapter():
            base = in_codes(quantizer)
            claim(base)
            assert torch.equal(predict(model, LLAMA.batch()), predict(base, LLAMA.batch()))
        assert_near(predict(model, LLAMA.batch()), merged)

    def test_one_merged_and_another_around_it(self) -> None:
        model = tuned(in_codes(BY_NAME["nf4"]))
        model.add_adapter("other", slimtune.LoraConfig(r=2, **LLAMA.options()))
        randomize(slimtune, model, "other", seed=9)
        model.set_adapter(["default", "other"])
        both = predict(model, LLAMA.batch())
        model.merge_adapter(["default"])
        assert_near(predict(model, LLAMA.batch()), both)

    def test_what_is_merged_is_in_the_dtype_that_the_module_computes_in(self, tmp_path: Path) -> None:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        model = tuned(loaded(LLAMA, tmp_path, config, torch.bfloat16))
        expected = predict(model, LLAMA.batch())
        model.merge_adapter()
        assert model.get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.float32
        assert relative_error(predict(model, LLAMA.batch()), expected) < 1e-2
        plain = model.merge_and_unload()
        assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}

    def test_what_a_method_leaves_alone_stays_packed(self) -> None:
        model = in_codes(BY_NAME["nf4"])
        model = randomize(slimtune, slimtune.get_peft_model(model, slimtune.LNTuningConfig()))
        before = storage(model)
        model.merge_adapter()
        changed = {name for name, what in storage(model).items() if what != before[name]}
        assert changed
        assert all("norm" in name for name in changed)


class TestPlain:
    """`merge_and_unload()`: as if the model had never been quantized."""

    @each_config
    @pytest.mark.parametrize("specimen", [LLAMA, GPT2, BERT, T5], ids=lambda specimen: specimen.name)
    def test_it_saves_and_loads_as_a_plain_model(self, specimen: Specimen, config: Any, tmp_path: Path) -> None:
        model = tuned(loaded(specimen, tmp_path / "base", config), specimen)
        expected = predict(model, specimen.batch())
        merged = model.merge_and_unload(safe_merge=True)
        plain = type(specimen.model()).from_pretrained(tmp_path / "base")
        assert merged is model
        assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
        for module, original in zip(merged.modules(), plain.modules(), strict=True):
            assert vars(module).keys() - {"_is_hf_initialized"} <= vars(original).keys()
        assert_near(predict(merged, specimen.batch()), expected)
        merged.save_pretrained(tmp_path / "merged")
        again = type(merged).from_pretrained(tmp_path / "merged")
        assert not hasattr(again.config, "quantization_config")
        assert torch.equal(predict(again, specimen.batch()), predict(merged, specimen.batch()))

    @each_config
    def test_nothing_says_that_it_was_quantized(self, config: Any, tmp_path: Path) -> None:
        merged = tuned(loaded(LLAMA, tmp_path, config)).merge_and_unload()
        for name in ("hf_quantizer", "quantization_method"):
            assert not hasattr(merged, name)
        for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
            assert not getattr(merged, name, False)
        assert "quantization_config" not in merged.config.to_dict()
        assert all(parameter.requires_grad for parameter in merged.parameters())
        merged.to(torch.bfloat16)  # which transformers refuses for a quantized model

    @each_config
    def test_the_trainer_trains_it(self, config: Any, tmp_path: Path) -> None:
        merged = tuned(loaded(LLAMA, tmp_path, config)).merge_and_unload()
        before = copies(dict(merged.named_parameters()))
        batch = LLAMA.batch()
        rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(2)]
        arguments = transformers.TrainingArguments(
            tmp_path / "run", max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-2
        )
        transformers.Trainer(merged, arguments, train_dataset=rows).train()
        assert [name for name, p in merged.named_parameters() if torch.equal(p, before[name])] == []

    def test_a_frozen_model_stays_frozen(self, tmp_path: Path) -> None:
        model = loaded(LLAMA, tmp_path).requires_grad_(False)
        assert not any(p.requires_grad for p in tuned(model).merge_and_unload().parameters())

    def test_layers_without_an_adapter_are_expanded_too(self, tmp_path: Path) -> None:
        model = tuned(loaded(LLAMA, tmp_path), target_modules=["q_proj"])
        merged = model.merge_and_unload()
        assert {type(m) for m in merged.modules() if hasattr(m, "in_features")} == {nn.Linear}

    @pytest.mark.parametrize("kind", ["nf4", "int8"])
    def test_hooks_of_accelerate_go_with_it(self, kind: str) -> None:
        """As on a model that is spread over devices."""
        model = in_codes(BY_NAME[kind])
        expected = predict(tuned(copy.deepcopy(model)), LLAMA.batch())
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        model = tuned(model)
        assert torch.equal(predict(model, LLAMA.batch()), expected)
        layer = model.get_submodule("model.layers.0.mlp.up_proj")
        assert layer._old_forward.__func__ is layer.adopted_from.forward
        merged = model.merge_and_unload()
        assert_near(predict(merged, LLAMA.batch()), expected)

    def test_unloading_leaves_it_quantized(self, tmp_path: Path) -> None:
        model = loaded(LLAMA, tmp_path / "base")
        before, objects = base_state(model), storage(model)
        model = tuned(model)
        model.merge_adapter()
        model = model.unload()
        assert storage(model) == objects
        assert model.is_quantized
        assert_same(base_state(model), before)
        model.save_pretrained(tmp_path / "again")
        again = type(model).from_pretrained(tmp_path / "again", device_map="cpu")
        assert_same(base_state(again), before)

    @pytest.mark.parametrize("already_merged", [True, False])
    def test_an_error_leaves_everything_as_it_was(self, already_merged: bool, tmp_path: Path) -> None:
        model = tuned(loaded(LLAMA, tmp_path))
        # A layer that nothing can expand.
        model.lm_head.extra = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
        if already_merged:
            model.merge_adapter()
        expected, objects, types = predict(model, LLAMA.batch()), storage(model), [type(m) for m in model.modules()]
        with pytest.raises(ConfigError, match=r"lm_head.*int8"):
            model.merge_and_unload()
        assert [type(m) for m in model.modules()] == types
        assert vars(model)["is_quantized"]
        assert torch.equal(predict(model, LLAMA.batch()), expected)
        assert model.active_adapters == ["default"]
        if not already_merged:
            assert storage(model) == objects
        model.unmerge_adapter()

    @pytest.mark.parametrize("how", [{}, {"requantize": True}], ids=["plain", "requantized"])
    def test_a_broken_adapter_is_not_merged(self, how: dict[str, Any]) -> None:
        model = tuned(in_codes(BY_NAME["nf4"]))
        broken = copies(adapter_tensors(slimtune, model))
        broken[max(broken)][0, 0] = float("nan")
        slimtune.set_peft_model_state_dict(model, broken)
        objects, types = storage(model), [type(m) for m in model.modules()]
        with pytest.raises(MergeError, match="layers"):
            model.merge_and_unload(**how)
        assert storage(model) == objects
        assert [type(m) for m in model.modules()] == types

    def test_a_failure_that_no_one_foresaw_leaves_everything_as_it_was(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As when memory runs out in the middle."""
        model = tuned(in_codes(BY_NAME["nf4"]))
        objects, expected = storage(model), predict(model, LLAMA.batch())
        delta: Any = model.get_submodule("model.layers.1.mlp.down_proj").deltas["default"]
        monkeypatch.setattr(delta, "product", lambda: torch.zeros(3) + torch.zeros(2))
        with pytest.raises(RuntimeError, match="size"):
            model.merge_and_unload()
        monkeypatch.undo()
        assert storage(model) == objects
        assert torch.equal(predict(model, LLAMA.batch()), expected)


class TestDequantize:
    """`slimtune.dequantize(model)`: the same without adapters."""

    @each_config
    @pytest.mark.parametrize("specimen", [LLAMA, GPT2], ids=lambda specimen: specimen.name)
    def test_a_folder_that_is_quantized_becomes_a_plain_one(
        self, specimen: Specimen, config: Any, tmp_path: Path
    ) -> None:
        loaded(specimen, tmp_path / "base", config).save_pretrained(tmp_path / "quantized")
        model = type(specimen.model()).from_pretrained(tmp_path / "quantized", device_map="cpu")
        claim(model)
        expected = predict(model, specimen.batch())
        assert dequantize(model) is model
        assert torch.equal(predict(model, specimen.batch()), expected)
        model.save_pretrained(tmp_path / "plain")
        again = type(model).from_pretrained(tmp_path / "plain")
        assert [type(m) for m in again.modules()] == [type(m) for m in specimen.model().modules()]
        assert torch.equal(predict(again, specimen.batch()), expected)

    def test_the_weights_are_those_that_bitsandbytes_makes_of_its_codes(self, tmp_path: Path) -> None:
        model = loaded(wide(), tmp_path)
        codes = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
        expected = {n: bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state) for n, m in codes.items()}
        dequantize(model)
        assert_same({name: model.get_submodule(name).weight.detach() for name in expected}, expected)

    def test_another_dtype_is_that_of_the_whole_model(self, tmp_path: Path) -> None:
        model = dequantize(loaded(LLAMA, tmp_path), torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert predict(model, LLAMA.batch()).isfinite().all()

    def test_norms_that_were_put_into_float32_stay_usable(self, tmp_path: Path) -> None:
        """peft's preparation for training casts what isn't quantized; the expanded weights go with it."""
        model = loaded(LLAMA, tmp_path, dtype=torch.bfloat16)
        model = dequantize(peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert predict(model, LLAMA.batch()).isfinite().all()

    def test_a_plain_model_stays_as_it_is(self) -> None:
        model: Any = LLAMA.model()
        before = storage(model)
        assert storage(dequantize(model)) == before

    def test_a_quantized_head_is_untied_from_the_embedding(self, tmp_path: Path) -> None:
        """Loaded again as tied, the head would be the embedding and not what its codes stand for."""
        model: Any = TIED_LLAMA.model()
        model.set_submodule("lm_head", BY_NAME["nf4"].quantize(nn.Linear(32, 101, bias=False)))
        dequantize(model).save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert torch.equal(predict(again, LLAMA.batch()), predict(model, LLAMA.batch()))

    def test_one_s_own_model_with_nothing_else_in_it(self) -> None:
        layer = BY_NAME["nf4"].quantize(nn.Linear(64, 32))
        host = dequantize(nn.Sequential(layer))
        assert type(host[0]) is nn.Linear
        assert host[0].weight.dtype == torch.float32

    def test_mistakes(self, tmp_path: Path) -> None:
        model = tuned(loaded(LLAMA, tmp_path))
        with pytest.raises(ConfigError, match=r"adapters default; call merge_and_unload\(\)"):
            dequantize(model)
        with pytest.raises(ConfigError, match=r"torch\.int8"):
            dequantize(LLAMA.model(), torch.int8)
        own = nn.Sequential(bnb.nn.Embedding4bit(32, 64).to("cpu"), BY_NAME["nf4"].quantize(nn.Linear(64, 32)))
        with pytest.raises(ConfigError, match=r"'0' is a Embedding4bit whose weight is stored as torch\.uint8"):
            dequantize(own)
        assert isinstance(own[1], bnb.nn.Linear4bit)


FOLDING = [name for name in sorted(methods()) if issubclass(methods()[name], TargetedConfig) and folds(name)]


class TestMethods:
    """Every method that has a form as weights, on NF4 in float32."""

    @pytest.mark.one_in(2)
    @pytest.mark.parametrize("method", FOLDING)
    @pytest.mark.parametrize("config", [NF4, INT8], ids=["nf4", "int8"])
    def test_merged_is_unmerged(self, method: str, config: Any, tmp_path: Path) -> None:
        made: Any = methods()[method](**NEEDED.get(method, {}))
        model = slimtune.get_peft_model(loaded(biased(), tmp_path / "base", config), made)
        model = randomize(slimtune, model).eval()
        base = predict(dequantize(loaded(biased(), tmp_path / "base", config)), LLAMA.batch())
        expected = predict(model, LLAMA.batch())
        assert relative_error(base, expected) > 1e-3
        model.merge_adapter()
        assert_near(predict(model, LLAMA.batch()), expected)
        model.unmerge_adapter()
        assert torch.equal(predict(model, LLAMA.batch()), expected)
        merged = model.merge_and_unload()
        assert_near(predict(merged, LLAMA.batch()), expected)
        merged.save_pretrained(tmp_path / "merged")
        again = type(merged).from_pretrained(tmp_path / "merged")
        assert torch.equal(predict(again, LLAMA.batch()), predict(merged, LLAMA.batch()))
