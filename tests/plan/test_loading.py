"""What is planned for loading against `slimtune.load` itself: what stays, and the most that is there on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import slimtune
from simulated import peak_of
from slimtune.bases.bitsandbytes import PIECE
from slimtune.plan.memory import PRECISIONS
from slimtune.plan.memory_tracker import MemoryTracker
from slimtune.plan.quantize import tensors_of
from slimtune.plan.simulate import simulate
from slimtune.quantization.config import KINDS

WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 4}
MODELS: dict[str, Any] = {
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE, vocab_size=500)),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=500, n_embd=256, n_layer=3, n_head=4)
    ),
    "T5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=500, d_model=256, d_kv=64, d_ff=1024, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    ),
}


def saved(model: Any, folder: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def loaded(folder: Path, base: str) -> tuple[int, int]:
    """What the model holds, and the most that was live while it was loaded."""
    tracker = MemoryTracker()
    with tracker:
        model, _ = slimtune.load(folder, device="cpu", quantize=None if base == "dense" else base)
        held = sum(storage.nbytes for storage in tracker.storages_of(tensors_of(model)))
    return held, peak_of(tracker)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("base", PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
def test_the_plan_of_loading_is_what_loading_takes(model: str, base: Any, tmp_path: Path) -> None:
    folder = saved(MODELS[model](), tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder)
    task_type = "SEQ_2_SEQ_LM" if model == "T5" else "CAUSAL_LM"
    method = slimtune.LoraConfig(task_type=task_type)
    planned = simulate(config, method, base=base, sequence=8, device="cpu", task_type=task_type).at("load")
    held, peak = loaded(folder, base)
    assert planned.parts.weights == held
    # What is quantized a piece at a time, as bitsandbytes' codes on a CPU, takes the room of a piece beside: in
    # float32, for 4 bits its codes too, and which of it is above a midpoint. GPT-2's weights are turned around before.
    is_4_bit = base in ("nf4", "fp4")
    pieces = 6 * PIECE if is_4_bit else 4 * PIECE if base in KINDS else 0
    turned = 2 * WIDE["hidden_size"] * WIDE["intermediate_size"] if is_4_bit and model == "GPT-2" else 0
    assert peak - pieces - turned <= 1.02 * planned.total
    assert planned.total <= 1.02 * peak
