"""Merging into a base that stays quantized: the codes of the merged weights, and what was lost told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import slimtune
from few_bits import BY_NAME, base_state, each_config, each_quantizer, in_codes, loaded, storage, tuned
from quantizers import Quantizer, four_bit
from slimtune.adapters.merge import compare_outputs
from slimtune.bases import base_of, claim
from slimtune.errors import ConfigError, MergeError
from tensors import adapter_tensors, assert_same, predict, relative_error
from zoo import GPT2, LLAMA

pytestmark = pytest.mark.filterwarnings("ignore:.*(quantiz|4-bit|8-bit|Already found|embed)")


class TestRequantized:
    """`merge_and_unload(requantize=True)`: quantized as it was, what was lost told."""

    @each_config
    @pytest.mark.parametrize("is_stored", [False, True], ids=["quantized-while-loaded", "stored-quantized"])
    def test_it_saves_and_loads_as_a_quantized_model(self, config: Any, is_stored: bool, tmp_path: Path) -> None:
        model = loaded(GPT2, tmp_path / "base", config)
        if is_stored:
            model.save_pretrained(tmp_path / "quantized")
            model = type(model).from_pretrained(tmp_path / "quantized", device_map="cpu")
        stored = model.config.to_dict()["quantization_config"]
        merged = tuned(model, GPT2).merge_and_unload(requantize=True)
        merged.save_pretrained(tmp_path / "merged")
        again = type(merged).from_pretrained(tmp_path / "merged", device_map="cpu")
        assert again.is_quantized
        assert again.config.to_dict()["quantization_config"] == stored
        assert_same(base_state(again), base_state(merged))
        claim(again)
        assert torch.equal(predict(again, GPT2.batch()), predict(merged, GPT2.batch()))

    @each_quantizer
    def test_the_codes_are_those_of_bitsandbytes_for_the_merged_weight(self, quantizer: Quantizer) -> None:
        plain = tuned(in_codes(quantizer)).merge_and_unload()
        merged = tuned(in_codes(quantizer)).merge_and_unload(requantize=True)
        expected = quantizer.model(plain)
        assert_same(base_state(merged), base_state(expected))

    @each_quantizer
    def test_the_storage_s_settings_stay(self, quantizer: Quantizer) -> None:
        before = in_codes(quantizer).get_submodule("model.layers.0.mlp.up_proj")
        after = tuned(in_codes(quantizer)).merge_and_unload(requantize=True).get_submodule("model.layers.0.mlp.up_proj")
        assert type(after.weight) is type(before.weight)
        assert after.weight.dtype == before.weight.dtype
        assert after.weight.shape == before.weight.shape
        if isinstance(after, bnb.nn.Linear4bit):
            ours, theirs = after.weight.quant_state, before.weight.quant_state
            for name in ("quant_type", "blocksize", "nested", "dtype", "shape"):
                assert getattr(ours, name) == getattr(theirs, name), name
            assert after.quant_state is ours
            assert after.weight.module is after

    def test_16_bit_storage_stays(self) -> None:
        model = Quantizer("bf16-storage", four_bit("nf4", quant_storage=torch.bfloat16)).model(LLAMA.model())
        merged = tuned(model).merge_and_unload(requantize=True)
        assert merged.get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.bfloat16

    def test_layers_without_an_adapter_keep_their_very_codes(self) -> None:
        model = tuned(in_codes(BY_NAME["nf4-double"]), target_modules=["q_proj"])
        before = storage(model)
        after = storage(model.merge_and_unload(requantize=True))
        assert {name for name in before if after[name] != before[name]} == {
            f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)
        }

    @each_quantizer
    def test_what_was_lost_is_told(self, quantizer: Quantizer) -> None:
        batch = LLAMA.batch()
        model = tuned(in_codes(quantizer))
        apart, loss = predict(model, batch), float(model(**batch).loss.detach())
        weight = frozen_weights(model)
        with pytest.warns(UserWarning, match=r"merged into quantized weights: .*% of the update is left"):
            merged = model.merge_and_unload(requantize=True, drift_inputs=batch)
        drift = merged.merge_drift
        assert drift.outputs == compare_outputs(apart, predict(merged, batch))
        assert drift.loss_before == pytest.approx(loss)
        assert drift.loss_after == pytest.approx(float(merged(**batch).loss.detach()))
        plain = frozen_weights(tuned(in_codes(quantizer)).merge_and_unload())
        update = {name: plain[name] - weight[name] for name in weight}
        left = {name: tensor - weight[name] for name, tensor in frozen_weights(merged).items()}
        size = sum(float(d.square().sum()) for d in update.values())
        assert drift.survived == pytest.approx(sum(float((left[n] * update[n]).sum()) for n in update) / size, rel=1e-4)
        strayed = sum(float((left[n] - update[n]).square().sum()) for n in update)
        assert drift.noise == pytest.approx((strayed / size) ** 0.5, rel=1e-4)
        assert drift.entries == sum(tensor.numel() for tensor in weight.values())

    def test_a_small_update_is_wiped_out_of_4_bits_and_told(self) -> None:
        model = tuned(in_codes(BY_NAME["nf4"]))
        stored = adapter_tensors(slimtune, model)
        slimtune.set_peft_model_state_dict(model, {name: 0.02 * tensor for name, tensor in stored.items()})
        before, plain = frozen_weights(model), copy.deepcopy(model).merge_and_unload()
        with pytest.warns(UserWarning, match="most of the update is rounded away: merge into 16 bits"):
            merged = model.merge_and_unload(requantize=True)
        assert all((plain.get_submodule(n).weight - tensor).abs().max() > 0 for n, tensor in before.items())
        assert merged.merge_drift.survived < 0.5
        assert merged.merge_drift.noise > 0.5

    def test_nothing_is_clipped_into_int8(self) -> None:
        """An entry far beyond the old scale of its row comes back, and it is counted."""
        model = tuned(in_codes(BY_NAME["int8"]), target_modules=["q_proj"])
        module = model.get_submodule("model.layers.0.self_attn.q_proj")
        delta = module.deltas["default"]
        with torch.no_grad():
            for layer in range(2):
                other = model.get_submodule(f"model.layers.{layer}.self_attn.q_proj").deltas["default"]
                for factor in other.trained:
                    factor.zero_()
            delta.trained[0][0, 3], delta.trained[1][5, 0] = 1.0, 7.0
        row = frozen_weights(model)["model.layers.0.self_attn.q_proj"][5]
        merged = model.merge_and_unload(requantize=True)
        assert merged.merge_drift.beyond == 1
        after = frozen_weights(merged)["model.layers.0.self_attn.q_proj"][5, 3]
        assert float(after) == pytest.approx(float(row[3] + 7.0 * delta.scaling), rel=1e-2)

    @each_quantizer
    def test_an_update_of_nothing_moves_nothing(self, quantizer: Quantizer) -> None:
        model = slimtune.get_peft_model(in_codes(quantizer), slimtune.LoraConfig(**LLAMA.options())).eval()
        expected = predict(model, LLAMA.batch())
        merged = model.merge_and_unload(requantize=True)
        assert merged.merge_drift.beyond == 0
        assert merged.merge_drift.survived == 1
        assert relative_error(predict(merged, LLAMA.batch()), expected) < 0.05

    def test_the_drift_is_that_of_the_last_merge(self) -> None:
        merged = tuned(in_codes(BY_NAME["nf4"])).merge_and_unload(requantize=True)
        first = merged.merge_drift
        again = tuned(merged).merge_and_unload(requantize=True)
        assert again.merge_drift != first
        assert not hasattr(tuned(again).merge_and_unload(), "merge_drift")

    def test_what_is_merged_already_is_merged_anew(self) -> None:
        model = tuned(in_codes(BY_NAME["nf4"]))
        model.merge_adapter()
        merged = model.merge_and_unload(requantize=True)
        assert_same(base_state(merged), base_state(tuned(in_codes(BY_NAME["nf4"])).merge_and_unload(requantize=True)))

    @pytest.mark.parametrize("already_merged", [True, False])
    def test_a_safe_merge_refuses_what_strays(self, already_merged: bool) -> None:
        model = tuned(in_codes(BY_NAME["fp4-128"]))
        if already_merged:
            model.merge_adapter()
        expected, types = predict(model, LLAMA.batch()), [type(m) for m in model.modules()]
        with pytest.raises(MergeError, match="beyond 10%"):
            model.merge_and_unload(requantize=True, safe_merge=True)
        assert torch.equal(predict(model, LLAMA.batch()), expected)
        assert [type(m) for m in model.modules()] == types
        assert bool(model.adapter_state.replaced) == already_merged

    def test_mistakes(self) -> None:
        plain = tuned(LLAMA.model())
        before = storage(plain)
        with pytest.raises(MergeError, match="default changes no quantized weight"):
            plain.merge_and_unload(requantize=True)
        assert storage(plain) == before
        with pytest.raises(ConfigError, match="requantize=True"):
            plain.merge_and_unload(drift_inputs=LLAMA.batch())
        huge = tuned(in_codes(BY_NAME["int8"]))
        before = storage(huge)
        stored = adapter_tensors(slimtune, huge)
        slimtune.set_peft_model_state_dict(huge, {name: 1e3 * tensor for name, tensor in stored.items()})
        with pytest.raises(MergeError, match=r"'model\..*merge into 16 bits"):
            huge.merge_and_unload(requantize=True)
        assert storage(huge) == before


def frozen_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the blocks' linear layers in floating point."""
    layers = {n: m for n, m in model.named_modules() if n.endswith("_proj")}
    return {n: base_of(m).weight(m).detach().double() for n, m in layers.items()}
