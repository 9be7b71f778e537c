"""A model whose weights are codes: those that GGUF's blocks of 32 hold go into the file as they are, rounded once.

4 bits are Q4_0 and 8 bits Q8_0, where the grid is symmetric and a scale serves whole blocks: groups of 64, or a row,
are several blocks of one scale.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.bases.integer import HoldsCodes
from slimtune.export.gguf.quantize import BLOCK, Blocks, q4_0_blocks, q8_0_blocks
from slimtune.storage.compressed import CODES, PARTS, ZERO

_KINDS = {4: ("Q4_0", q4_0_blocks), 8: ("Q8_0", q8_0_blocks)}


def holds_codes(model: nn.Module) -> bool:
    """Whether weights of a model are codes of ours."""
    return any(isinstance(module, HoldsCodes) and _is_packed(module) for module in model.modules())


def tensors_with_codes(model: Any, kind: str | None) -> tuple[dict[str, Tensor | Blocks], list[str]]:
    """The tensors of a model by the names that they have where it is plain, and what a reader should know of them.

    A weight that is tied to another before it is left out.

    Args:
        kind: as which type matrices are written; codes of another one are expanded. None for that of the codes.
    """
    tensors: dict[str, Tensor | Blocks] = {}
    seen: set[tuple[int, int]] = set()
    kept: Counter[str] = Counter()
    expanded: Counter[str] = Counter()
    rounded = rounds_inputs = 0
    modules: dict[str, Any] = dict(model.named_modules())
    held: dict[str, Any] = {p: m for p, m in modules.items() if isinstance(m, HoldsCodes) and _is_packed(m)}
    for path, module in held.items():
        if _is_first(module.weight, seen):
            reason = _misfit(module, kind)
            weight = _expanded(module) if reason else _blocks(module)
            tensors[f"{path}.weight"] = weight
            kept.update([] if reason else [_KINDS[module.packed_base.bits][0]])
            expanded.update([reason] if reason else [])
            # GGUF's blocks hold a float16 scale each; one in bfloat16 or float32 may lie between two of those.
            scales = module.weight_scale
            rounded += not reason and not torch.equal(scales.to(torch.float16).float(), scales.float())
            rounds_inputs += module.packed_base.rounds_inputs
    for name, tensor in model.state_dict().items():
        path, _, part = name.rpartition(".")
        if not (path in held and part in (*PARTS, CODES)) and _is_first(tensor, seen):
            tensors[name] = tensor
    notes = [f"{count} matrices keep their codes as {name}" for name, count in kept.items()]
    notes += [f"{count} matrices are expanded: {reason}" for reason, count in expanded.items()]
    if rounded:
        notes.append(f"in {rounded} matrices a scale is not a float16, and is rounded to the nearest")
    if rounds_inputs:
        notes.append("llama.cpp rounds inputs by rules of its own, in blocks of 32 and not by the token")
    return tensors, notes


def _is_first(tensor: Tensor, seen: set[tuple[int, int]]) -> bool:
    # Not by the object: a state dict hands out a new tensor for each end of a tie.
    place = tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())
    # Empty tensors all have the address 0, and are no ties.
    is_first = place not in seen or not tensor.numel()
    seen.add(place)
    return is_first


def _is_packed(module: Any) -> bool:
    return module.packed_base.is_packed(module)


def _misfit(module: Any, kind: str | None) -> str:
    """Why the codes of a module can't be kept; empty where they can."""
    base = module.packed_base
    group_size = base.group_size(module)
    if kind not in (None, _KINDS[base.bits][0]):
        return f"their codes are in {base.bits} bits, and {kind} was asked for"
    if ZERO in module._buffers:
        return f"{_KINDS[base.bits][0]} has no zero points"
    if group_size % BLOCK:
        return f"groups of {group_size} are no whole blocks of {BLOCK}"
    return ""


def _blocks(module: Any) -> Blocks:
    base = module.packed_base
    per_group = base.group_size(module) // BLOCK
    # (out, groups) to (out, in / 32): a group of 64 inputs is two blocks of 32 with the same scale.
    scales_OG = module.weight_scale.float().repeat_interleave(per_group, dim=1)
    return _KINDS[base.bits][1](base.codes(module), scales_OG)


def _expanded(module: Any) -> Tensor:
    """As a plain module stores it."""
    weight_OI = module.packed_base.weight(module)
    # GPT-2's Conv1D stores (in, out).
    is_turned = module.packed_base.is_transposed or "source_cls" in vars(module)
    return weight_OI.t() if is_turned else weight_OI
