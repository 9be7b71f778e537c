"""A dense model made quantized by bitsandbytes' own functions, on real tensors and on fake ones."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils.quantization_config import BitsAndBytesConfig

from slimtune.bases import base_of
from slimtune.plan.setting import Setting


def quantize(model: Any, setting: Setting) -> int:
    """Store the linear layers as the setting says; gives back the bytes of the largest one before.

    transformers chooses the layers: all but the output layer and what is kept in float32.
    """
    from bitsandbytes.functional import create_dynamic_map, name2qmap

    is_4bit = setting.base != "int8"
    how = BitsAndBytesConfig(
        load_in_4bit=is_4bit,
        load_in_8bit=not is_4bit,
        bnb_4bit_quant_type="nf4" if setting.base == "int8" else setting.base,
        bnb_4bit_use_double_quant=setting.double_quantization,
        bnb_4bit_compute_dtype=getattr(torch, setting.dtype),
    )
    dense = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    with unset_fake_temporarily():
        # bitsandbytes keeps this table for the whole process: it must not become a fake one.
        name2qmap.setdefault("dynamic", create_dynamic_map())
        kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or [])]
        replace_with_bnb_linear(model, kept, how)
    largest = 0
    for name, before in dense.items():
        module: Any = model.get_submodule(name)
        if module is before:
            continue
        weight = before.weight.detach().t().contiguous() if isinstance(before, Conv1D) else before.weight.detach()
        largest = max(largest, weight.nbytes)
        pack = _packed_4bit if is_4bit else _packed_8bit
        module.weight = pack(weight, module)
        if before.bias is not None:
            module.bias = nn.Parameter(before.bias.detach(), requires_grad=False)
    dense.clear()
    gc.collect()
    return largest


def _packed_4bit(weight: Tensor, module: Any) -> Any:
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn.modules import Params4bit

    stored: Any = Params4bit
    options = {"quant_type": module.weight.quant_type, "compress_statistics": module.weight.compress_statistics}
    if not isinstance(weight, FakeTensor):
        return stored(weight, requires_grad=False, module=module, **options).to(weight.device)
    # A fake tensor can't be of bitsandbytes' own class of parameters; what is stored is the same.
    codes, state = quantize_4bit(weight, blocksize=64, **options)
    parameter: Any = nn.Parameter(codes, requires_grad=False)
    parameter.quant_state = module.quant_state = state
    return parameter


def _packed_8bit(weight: Tensor, module: Any) -> Any:
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn.modules import Int8Params

    stored: Any = Int8Params
    if not isinstance(weight, FakeTensor):
        return stored(weight, requires_grad=False, has_fp16_weights=False).to(weight.device)
    codes, scales, _ = int8_vectorwise_quant(weight)
    parameter: Any = nn.Parameter(codes, requires_grad=False)
    parameter.SCB = scales
    return parameter


def tensors_of(model: nn.Module) -> list[Tensor]:
    """All that a model holds: parameters, buffers, and what quantized weights keep beside their codes."""
    return [tensor for module in model.modules() for tensor in base_of(module).held(module)]
