"""A dense model made quantized as `slimtune.load(quantize=...)` makes it, on real tensors and on fake ones.

Which layers are quantized is decided by the quantizers of the loading themselves.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers.core_model_loading import dot_natural_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from slimtune.bases import base_of
from slimtune.errors import PlanError
from slimtune.plan.memory import Setting, StoredIntegers
from slimtune.plan.memory_tracker import MemoryTracker, unwrapped
from slimtune.quantization.config import INTEGER_KINDS, TORCHAO_KINDS, Quantization, require_for
from slimtune.storage.compressed import scheme_for


def quantize(model: Any, setting: Setting, tracker: MemoryTracker) -> int:
    """Store the linear layers as the setting says; gives back the most bytes beyond all weights that loading so takes.

    Args:
        tracker: the one that is entered.

    Raises:
        PlanError: there is no linear layer, or torchao refuses the width of one.
        MissingDependencyError: the library that quantizes isn't installed.
    """
    if setting.stored is None:
        require_for(setting.base)
    if setting.stored is not None:
        beyond = _as_stored(model, setting.stored)
    elif setting.base in TORCHAO_KINDS:
        beyond = _by_torchao(model, setting.base, tracker)
    elif setting.base in INTEGER_KINDS:
        beyond = _in_integers(model, setting.base, tracker)
    else:
        beyond = _by_bitsandbytes(model, setting, tracker)
    gc.collect()
    return _beyond_all(model, beyond)


def _beyond_all(model: nn.Module, beyond: dict[str, int]) -> int:
    """Tensors are read in the order of their names, so that what comes last has all others beside it.

    Args:
        beyond: what each layer takes beyond what it keeps, while it is quantized.
    """
    # A running sum over layers: peak = max over i of (layers 0..i, quantized) + (dense form and scratch of layer i).
    there, fullest, seen = 0, 0, set()
    aliases = getattr(model, "all_tied_weights_keys", {})
    for name, module in sorted(model.named_modules(), key=lambda pair: dot_natural_key(f"{pair[0]}.weight")):
        for tensor in unwrapped([] if f"{name}.weight" in aliases else base_of(module).held(module)):
            storage = tensor.untyped_storage()
            there += 0 if storage._cdata in seen else storage.nbytes()
            seen.add(storage._cdata)
        fullest = max(fullest, there + beyond.get(name, 0))
    return fullest - there


def _by_torchao(model: Any, kind: str, tracker: MemoryTracker) -> dict[str, int]:
    from torchao.quantization import quantize_

    from slimtune.quantization.config import torchao_settings

    how = torchao_settings(kind).get_apply_tensor_subclass()
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    beyond = {}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and should_convert_module(f"{name}.weight", skipped):
            module.weight.requires_grad_(False)
            dense, before = module.weight.nbytes, len(tracker.storages)
            try:
                quantize_(module, how, lambda *_: True)
            except (AssertionError, RuntimeError) as error:
                raise PlanError(
                    f"torchao can't quantize {name} of width {module.in_features}: its groups must divide the widths "
                    "of all linear layers; choose int8-torchao or nf4"
                ) from error
            kept = sum(tensor.nbytes for tensor in unwrapped([module.weight]))
            # While a layer is quantized its dense form and the scratch of the quantizer stand beside the codes that
            # stay.
            beyond[name] = dense + max(0, tracker.peak_since(before) - kept)
    return beyond


def _as_stored(model: Any, stored: StoredIntegers) -> dict[str, int]:
    """Give modules the codes and scales that a folder has of them; as they are read they are unpacked beside it."""
    from slimtune.bases.int4 import LinearInt4
    from slimtune.bases.int8 import EmbeddingInt8, LinearInt8
    from slimtune.ops.grid import SCALE_DTYPE

    beyond: dict[str, int] = {}
    taken: dict[int, Any] = {}
    for name, module in list(model.named_modules()):
        is_embedding = isinstance(module, nn.Embedding)
        if not (is_embedding or isinstance(module, nn.Linear)):
            continue
        scheme = scheme_for(name, type(module).__name__, stored.schemes, stored.ignore)
        if scheme is None:
            continue
        weight: Any = module.weight
        kind: Any = EmbeddingInt8 if is_embedding else LinearInt4 if scheme.bits == 4 else LinearInt8
        other = taken.get(id(weight))
        taken[id(weight)] = module
        rows, columns = weight.shape
        codes: Any = torch.zeros(rows, columns, dtype=torch.int8) if other is None else other.weight
        groups = columns // scheme.group_size if scheme.group_size else 1
        scales = torch.zeros(rows, groups, dtype=SCALE_DTYPE) if other is None else other.weight_scale
        if other is None:
            kind.take(module, codes, scales)
        else:
            # Tied: the very same codes and scales.
            module.__class__, module.compute_dtype = kind, weight.dtype
            module._parameters["weight"] = codes
            module.register_buffer("weight_scale", scales, persistent=False)
        beyond[name] = rows * columns if other is None else 0
    return beyond


def _in_integers(model: Any, kind: str, tracker: MemoryTracker) -> dict[str, int]:
    from slimtune.bases.int4 import LinearInt4
    from slimtune.bases.packed import as_linear
    from slimtune.ops.grid import rounded
    from slimtune.quantization.linears import group_size_for, quantized_linears

    group_size = Quantization(kind).blocksize
    names = quantized_linears(model, _new_heads(model))
    group_size_for(model, names, group_size)
    beyond: dict[str, int] = {}
    # Layers of one shape and dtype take the same scratch, and the search for scales is long: it is followed once each.
    followed: dict[tuple[torch.Size, torch.dtype], tuple[list[tuple[torch.Size, torch.dtype]], int]] = {}
    for name in names:
        module: Any = model.get_submodule(name)
        weight_OI, before = as_linear(module).weight.detach(), len(tracker.storages)
        kind_of_layer = weight_OI.shape, weight_OI.dtype
        if kind_of_layer in followed:
            outlines, scratch = followed[kind_of_layer]
            LinearInt4.take(module, *(weight_OI.new_empty(shape, dtype=dtype) for shape, dtype in outlines))
        else:
            codes, scales, _ = rounded(weight_OI, group_size, 4)
            LinearInt4.take(module, codes, scales)
            held = sum(tensor.nbytes for tensor in (module.weight, module.weight_scale))
            scratch = max(0, tracker.peak_since(before) - held)
            # Not the tensors themselves, which would count as memory that loading takes.
            followed[kind_of_layer] = [(part.shape, part.dtype) for part in (codes, scales)], scratch
            del codes, scales
        beyond[name] = weight_OI.nbytes + scratch
    return beyond


def _by_bitsandbytes(model: Any, setting: Setting, tracker: MemoryTracker) -> dict[str, int]:
    dense = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    _replace(model, setting)
    beyond = {}
    for name, plain in dense.items():
        module: Any = model.get_submodule(name)
        if module is plain:
            continue
        weight = plain.weight.detach().t().contiguous() if isinstance(plain, Conv1D) else plain.weight.detach()
        before = len(tracker.storages)
        module.weight = _packed_8bit(weight, setting) if setting.base == "int8" else _packed_4bit(weight, module)
        held = sum(tensor.nbytes for tensor in base_of(module).held(module))
        beyond[name] = weight.nbytes + max(0, tracker.peak_since(before) - held)
        if plain.bias is not None:
            module.bias = nn.Parameter(plain.bias.detach(), requires_grad=False)
    dense.clear()
    return beyond


def _replace(model: Any, setting: Setting) -> None:
    """Put bitsandbytes' modules in the place of those that the loading would quantize."""
    from bitsandbytes.functional import create_dynamic_map, name2qmap

    from slimtune.quantization.load import quantizer_for

    options: dict[str, Any] = {} if setting.base == "int8" else {"double": setting.double_quantization}
    with unset_fake_temporarily():
        # bitsandbytes keeps this table for the whole process: it must not become a fake one.
        name2qmap.setdefault("dynamic", create_dynamic_map())
        quantizer = quantizer_for(Quantization(setting.base, keep=_new_heads(model), **options))
        quantizer._process_model_before_weight_loading(model)


def _new_heads(model: Any) -> list[str]:
    """Linear layers of a head that the file of a base doesn't have: what is new is not quantized."""
    if not type(model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification")):
        return []
    inside = f"{model.base_model_prefix}."
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and not n.startswith(inside)]


def _packed_4bit(weight: Tensor, module: Any) -> Any:
    from bitsandbytes.functional import quantize_4bit

    from slimtune.bases.bitsandbytes import packed_4bit

    kind, double = module.weight.quant_type, module.weight.compress_statistics
    if not isinstance(weight, FakeTensor):
        return packed_4bit(weight, 64, kind, double, module.weight.quant_storage, module)
    # A fake tensor can't be of bitsandbytes' own class of parameters; what is stored is the same.
    codes, state = quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=double)
    parameter: Any = nn.Parameter(codes, requires_grad=False)
    parameter.quant_state = module.quant_state = state
    return parameter


def _packed_8bit(weight: Tensor, setting: Setting) -> Any:
    from bitsandbytes.functional import int8_vectorwise_quant

    from slimtune.bases.bitsandbytes import packed_8bit

    if not isinstance(weight, FakeTensor):
        return packed_8bit(weight)
    # Codes come by way of float16: on a CPU a piece at a time, on a GPU of the whole weight.
    codes, scales, _ = int8_vectorwise_quant(weight.half() if setting.device == "cuda" else weight)
    parameter: Any = nn.Parameter(codes, requires_grad=False)
    parameter.SCB = scales
    return parameter


def tensors_of(model: nn.Module) -> list[Tensor]:
    """All that a model holds: parameters, buffers, and what quantized weights are made of."""
    return list(unwrapped(tensor for module in model.modules() for tensor in base_of(module).held(module)))
