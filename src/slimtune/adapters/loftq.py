"""LoftQ on a model that is quantized: LoRA started at what quantization took (Li et al. 2023, arXiv:2310.08659)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from slimtune.adapters.adapter import attached
from slimtune.errors import ConfigError
from slimtune.methods.lora.config import LoraConfig
from slimtune.methods.lora.layers import LoraLinear
from slimtune.methods.lora.loftq import Originals, is_4bit


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """Start an adapter anew on all layers in 4 bits: s B A is the best approximation of W - Q in its rank.

    Args:
        model_path: the folder, Hub id, packaged name or safetensors file with the weights W from before quantization;
            by default where the model was loaded from.
        callback: called with the model and a layer's name once that layer is done; where it says False, the layer gets
            back what it had.

    Raises:
        AdapterNotFoundError: there is no such adapter.
        ConfigError: nothing of the adapter is LoRA on a layer in 4 bits; the weights can't be found, or are others.
    """
    peft_model.adapter_state.check_known(adapter_name)
    config = peft_model.peft_config[adapter_name]
    placed = [(s, d) for s, d in attached(peft_model, adapter_name) if isinstance(d, LoraLinear) and is_4bit(s)]
    if not placed or not isinstance(config, LoraConfig):
        raise ConfigError(
            f"the adapter '{adapter_name}' has no LoRA on a layer in 4 bits; load the model with quantize=\"nf4\" and "
            "attach LoRA to it"
        )
    if config.moves_start:
        raise ConfigError(
            f"the adapter '{adapter_name}' keeps the start that init_lora_weights={config.init_lora_weights!r} gave "
            "it; attach one with init_lora_weights='loftq'"
        )
    start = replace(config, init_lora_weights="loftq", eva_config=None)
    start.originals = Originals.of(peft_model, model_path)
    for site, delta in placed:
        # Clones, one layer at a time: `state_dict` gives views, which the new start would overwrite.
        before = {name: tensor.clone() for name, tensor in delta.state_dict().items()}
        delta.initialise(start, site)
        if callback is not None and not callback(peft_model, site.name):
            delta.load_state_dict(before)
