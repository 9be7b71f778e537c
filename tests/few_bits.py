"""Models in few bits as users have them, and what they consist of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig

import slimtune
from quantizers import QUANTIZERS, Quantizer
from tensors import copies, randomize
from zoo import LLAMA, Specimen, llama

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
INT8 = BitsAndBytesConfig(load_in_8bit=True)
BY_NAME = {quantizer.name: quantizer for quantizer in QUANTIZERS}
each_config = pytest.mark.parametrize("config", [NF4, INT8], ids=["nf4", "int8"])
each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)


def loaded(specimen: Specimen, folder: Path, config: Any = NF4, dtype: torch.dtype = torch.float32) -> Any:
    """A specimen as a user has it in few bits: written in 16 or 32, quantized by transformers while it is loaded."""
    model: Any = specimen.model().to(dtype)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=config, dtype=dtype, device_map="cpu")


def options(specimen: Specimen) -> dict[str, Any]:
    return {name: value for name, value in specimen.options().items() if name != "fan_in_fan_out"}


def tuned(model: Any, specimen: Specimen = LLAMA, **changes: Any) -> Any:
    config = slimtune.LoraConfig(**{"r": 4, **options(specimen), **changes})
    return randomize(slimtune, slimtune.get_peft_model(model, config)).eval()


def in_codes(quantizer: Quantizer) -> Any:
    return quantizer.model(LLAMA.model())


def storage(model: nn.Module) -> dict[str, tuple[int, type]]:
    """Which objects the base consists of."""
    found = [(n, p) for n, p in model.named_parameters() if ".deltas." not in n]
    return {name: (id(parameter), type(parameter)) for name, parameter in found}


def base_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copies({name: tensor for name, tensor in model.state_dict().items() if ".deltas." not in name})


def wide() -> Specimen:
    """A Llama whose rows begin with a block: where they don't, bitsandbytes' own expansion on CPUs is wrong."""
    return replace(LLAMA, name="wide", build=lambda: llama(hidden_size=64, intermediate_size=128))


def biased() -> Specimen:
    """A Llama with a bias in each layer of its blocks."""
    return replace(LLAMA, name="biased", build=lambda: llama(attention_bias=True, mlp_bias=True))
