"""What a plan says: parts that add up, the place of the peak, devices, and mistakes in what is asked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import slimtune
from slimtune.errors import ConfigError, ModelNotFoundError
from slimtune.plan.extrapolate import find_repeating_blocks
from slimtune.plan.memory import Sharing
from slimtune.plan.memory_tracker import MemoryTracker
from slimtune.plan.simulate import simulate
from slimtune.plan.trace import gradients

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 500, "max_position_embeddings": 256,
}  # fmt: skip
LINEAR = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)  # numbers in the linear layers of both blocks
REST = 2 * 500 * 64 + 5 * 64  # embeddings, head, norms


def config(**changes: Any) -> Any:
    return transformers.LlamaConfig(**{**SHAPE, **changes})


def plan(method: Any = None, model: Any = None, **setting: Any) -> Any:
    setting = {"task_type": "CAUSAL_LM", "sequence": 64, "batch": 2, **setting}
    return simulate(model or config(), method, **setting)


def test_the_parts_of_full_tuning_are_what_is_known_of_them() -> None:
    parts = plan(dtype="bfloat16").at("update").parts
    rotary = 8 * 4 * 2  # two copies of the inverse frequencies
    assert parts.weights == 2 * (LINEAR + REST) + rotary
    assert parts.gradients == 2 * (LINEAR + REST)
    # Both moments, and a count of 4 bytes for each of the tensors.
    assert parts.optimizer == 4 * (LINEAR + REST) + 4 * (2 * 9 + 3)
    assert parts.adapter == 0


def test_what_is_not_asked_for_is_not_simulated() -> None:
    ordinary = ["load", "attach", "forward", "backward", "update"]
    assert [snapshot.phase for snapshot in plan(slimtune.LoraConfig(r=4)).snapshots] == ordinary
    more = plan(slimtune.LoraConfig(r=4), evaluation=True, merge=True).snapshots
    assert [snapshot.phase for snapshot in more] == [*ordinary, "evaluation", "merge"]


def test_a_4_bit_base_takes_half_a_byte_a_weight_and_its_scales() -> None:
    weights = plan(slimtune.LoraConfig(), base="nf4", double_quantization=False).at("load").parts.weights
    rotary, codebooks = 8 * 4 * 2, 14 * 16 * 4
    assert weights == LINEAR // 2 + LINEAR // 64 * 4 + codebooks + 2 * REST + rotary


def test_an_adapter_takes_its_parameters_in_float32() -> None:
    result = plan(slimtune.LoraConfig(r=4))
    # And once more, to go back to where a loss is no number.
    assert result.at("update").parts.adapter == 2 * 4 * result.trainable
    assert result.at("update").parts.gradients == 4 * result.trainable
    assert result.parameters == LINEAR + REST + result.trainable


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    few, all_of_them = (plan(slimtune.LoraConfig(), gradient_checkpointing=on) for on in (True, False))
    assert sum(few.activations.values()) < 0.5 * sum(all_of_them.activations.values())
    assert few.peak_bytes < all_of_them.peak_bytes


def test_gradients_live_through_the_forward_of_an_accumulation() -> None:
    once, more = (plan(accumulation=count).at("forward").parts.gradients for count in (1, 2))
    assert (once, more) == (0, 2 * (LINEAR + REST))


def test_of_an_accumulation_only_what_learns_has_a_gradient() -> None:
    learns, stays = (torch.nn.Parameter(torch.ones(size)) for size in (5, 7))
    tracker: Any = MemoryTracker()
    with gradients(SimpleNamespace(tracker=tracker), [learns, stays]):  # type: ignore[arg-type]
        learns.sum().backward()
    assert learns.grad is not None
    assert learns.grad.tolist() == [1.0] * 5
    assert stays.grad is None
    # The other one counts at no time.
    assert [storage.nbytes for storage in tracker.storages if storage.died >= storage.born] == [5 * 4]


def test_work_grows_with_the_accumulation() -> None:
    one, eight = (plan(slimtune.LoraConfig(), accumulation=count).work for count in (1, 8))
    assert eight["forward"].flops == 8 * one["forward"].flops
    assert eight["backward"].flops == 8 * one["backward"].flops
    # A frozen weight costs 2 operations forward and 2 backward, a trained one 2 more.
    assert one["forward"].flops > 2 * 128 * LINEAR


def test_the_peak_names_a_module_of_the_model() -> None:
    result = plan(slimtune.LoraConfig(), gradient_checkpointing=True, sequence=8)
    assert result.peak.module in dict(plan_model().named_modules())
    assert result.peak.operation.startswith("aten.")
    assert result.peak_bytes == sum(result.peak.parts.named().values())


def plan_model() -> Any:
    return transformers.LlamaForCausalLM(config())


def test_on_cuda_attention_scores_are_not_held() -> None:
    tall = {"sequence": 256, "padded": False}
    eager, fused = (plan(slimtune.LoraConfig(), attention=how, **tall) for how in ("eager", "sdpa"))
    scores = 2 * 4 * 256 * 256 * 2
    assert sum(eager.activations.values()) - sum(fused.activations.values()) >= scores


def test_the_loss_of_cuda_is_computed_in_larger_chunks() -> None:
    wide = config(vocab_size=60_000)
    cpu, cuda = (
        plan(slimtune.LoraConfig(), wide, device=device, sequence=256).at("forward") for device in ("cpu", "cuda")
    )
    assert cuda.parts.loss > 2 * cpu.parts.loss


def test_paged_state_lies_beside_the_device() -> None:
    wide = config(hidden_size=512, intermediate_size=512)
    paged, resident = (plan(None, wide, optimizer=name) for name in ("paged_adamw_8bit", "adamw_8bit"))
    assert resident.paged_bytes == 0
    assert paged.paged_bytes > 1_000_000
    assert resident.peak.parts.optimizer - paged.peak.parts.optimizer == paged.paged_bytes


def test_allocations_are_rounded_as_the_allocator_does() -> None:
    result = plan(slimtune.LoraConfig(r=1), rounded=lambda nbytes: -(-nbytes // 512) * 512)
    assert result.peak_bytes % 512 == 0
    assert result.peak_bytes > plan(slimtune.LoraConfig(r=1)).peak_bytes


def test_several_devices_share_all_but_the_activations() -> None:
    result = plan()
    alone, shared = result.sharded(1), result.sharded(4)
    assert alone == result.peak.parts
    assert shared.optimizer == -(-alone.optimizer // 4)
    assert shared.activations == alone.activations
    assert shared.workspace == alone.workspace + 3 * result.block_bytes


def test_copies_hold_all_of_it_and_the_gradients_twice() -> None:
    result = plan(slimtune.LoraConfig())
    alone, copied = result.peak.parts, result.sharded(4, Sharing(shards=False))
    assert copied.total == alone.total + result.trainable_bytes
    assert result.exchanged_bytes(4, Sharing(shards=False)) == 2 * result.trainable_bytes * 3 // 4


def test_what_is_offloaded_leaves_blocks_and_activations() -> None:
    result = plan()
    shared, offloaded = result.sharded(4), result.sharded(4, Sharing(offloads=True))
    assert (offloaded.weights, offloaded.gradients, offloaded.optimizer) == (0, 0, 0)
    assert offloaded.activations > 0
    assert offloaded.total < shared.total
    assert result.sharded(4, Sharing(regathers=False)).workspace >= shared.workspace


def test_a_folder_with_a_configuration_alone_is_enough(tmp_path: Path) -> None:
    config(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    from_folder = simulate(tmp_path, slimtune.LoraConfig(), sequence=64, batch=2)
    assert from_folder.peak_bytes == plan(slimtune.LoraConfig()).peak_bytes


def test_a_model_that_is_stored_in_4_bits_is_planned_so(tmp_path: Path) -> None:
    config(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    how = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": how}))
    stored = simulate(tmp_path, slimtune.LoraConfig(), sequence=64, batch=2)
    assert stored.setting.base == "nf4"
    assert stored.peak_bytes == plan(slimtune.LoraConfig(), base="nf4").peak_bytes


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"bach": 2}, "did you mean 'batch'"),
        ({"batch": 0}, "batch must be a whole number of at least 1"),
        ({"sequence": -5}, "sequence must be"),
        ({"sequence": 1000}, "256 positions"),
        ({"base": "nf5"}, "did you mean 'nf4'"),
        ({"base": "nf4"}, "pass a method's config"),
        ({"optimizer": "adamw_8bits"}, "did you mean 'adamw_8bit'"),
        ({"attention": "flash"}, "attention must be one of"),
        ({"task_type": "FEATURE_EXTRACTION"}, "loss"),
    ],
)
def test_settings_that_can_not_be_are_refused(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(**setting)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        simulate(tmp_path / "nothing", slimtune.LoraConfig())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="can't be read"):
        simulate(tmp_path, slimtune.LoraConfig())


def test_a_model_without_the_blocks_of_its_configuration_stands_for_itself() -> None:
    llama = transformers.LlamaForCausalLM
    deep = config(num_hidden_layers=12)
    assert find_repeating_blocks(deep, llama, None) is not None
    assert find_repeating_blocks(deep, lambda _: torch.nn.Linear(2, 2), None) is None
    assert find_repeating_blocks(deep, lambda _: llama(config(num_hidden_layers=13)), None) is None
