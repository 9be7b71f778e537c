"""The bases that are measured: SmolLM2 from its folder, Llamas of random weights, plain or quantized by either side."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from benchmarks.cases import Codec, Work

LLAMAS: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}

BITSANDBYTES: Mapping[Codec, Mapping[str, Any]] = {
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def settings_of(codec: Codec, dtype: torch.dtype) -> Any:
    """How transformers is told of a codec."""
    return transformers.BitsAndBytesConfig(**BITSANDBYTES[codec], bnb_4bit_compute_dtype=dtype)


def base_model(work: Work, folder: str, library: Any | None = None) -> Any:
    """The base as a library loads it; without a way of its own, as transformers does."""
    dtype = getattr(torch, work.dtype)
    if work.quantize:
        settings = settings_of(work.quantize, dtype)
        if hasattr(library, "load"):
            return library.load(folder, work.dtype, work.device, quantize=settings)[0]
        named = {"dtype": dtype, "quantization_config": settings, "device_map": {"": work.device}}
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **named)
    return random_llama(work) if work.model in LLAMAS else plain_base(folder, dtype)


def plain_base(folder: str, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def random_llama(work: Work) -> Any:
    config = transformers.LlamaConfig(**LLAMAS[work.model], max_position_embeddings=8192)
    with torch.device(work.device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, work.dtype))


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    random_llama(Work(**json.loads(sys.argv[1]))).save_pretrained(sys.argv[2])
    print("{}")
