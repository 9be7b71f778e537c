"""LoRA files of mixtures of experts from before transformers kept all experts of a layer in two tensors.

Such a file has factors for each expert's own layers (Mixtral's w1, w2, w3; gate_proj, up_proj, down_proj elsewhere).
The model has one tensor (E, 2 * width, dim) of the gates above the ups, and one (E, dim, width). In one product

[W1 + s B1 A1; W3 + s B3 A3] = [W1; W3] + s [[B1, 0], [0, B3]] [A1; A3]

which is a LoRA of rank r1 + r3 on the first tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.frozen import walk
from slimtune.errors import warn
from slimtune.storage.peft_format import KEY_PREFIX, key

_LAYER = re.compile(
    r"(?P<block>.+)\.(block_sparse_moe|mlp|feed_forward)\.experts\.(?P<expert>\d+)"
    r"\.(?P<layer>w1|w2|w3|gate_proj|up_proj|down_proj)\.lora_(?P<factor>[AB])\.weight"
)
_FUSED = {"gate_up_proj": (("w1", "gate_proj"), ("w3", "up_proj")), "down_proj": (("w2", "down_proj"),)}
"""The model's tensors, and the layers that each is made of, from top to bottom."""

Factors = dict[tuple[str, int, str, str], Tensor]
"""A and B by the block, the expert, its layer and the letter."""


def onto_fused_experts(model: Any, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with those of single experts put together for the model's own; `config` then names those.

    What doesn't fit together is left as it is, for the error to name.
    """
    factors: Factors = {}
    names: dict[str, str] = {}
    for name in tensors:
        match = _LAYER.fullmatch(name.removeprefix(KEY_PREFIX))
        if match:
            factors[match["block"], int(match["expert"]), match["layer"], match["factor"]] = tensors[name]
            names[name] = match["layer"]
    if not factors or config.peft_type != "LORA" or config.use_dora:
        return dict(tensors)
    fused: dict[str, Tensor] = {}
    patterns: dict[str, tuple[int, float]] = {}
    for path, module in walk(model):
        block = path.rpartition(".")[0].rpartition(".")[0]
        if not path.endswith(".experts") or not _is_fused(module):
            continue
        made = {}
        for parameter, layers in _FUSED.items():
            pair = _put_together(config, path, module.get_parameter(parameter), block, layers, factors)
            if pair is not None:
                made[parameter] = pair
        for parameter, (a, b, scale) in made.items():
            rank = len(a) // len(module.get_parameter(parameter))
            patterns[f"{path}.{parameter}"] = rank, scale * (rank**0.5 if config.use_rslora else rank)
            # As `peft` nests its wrappers of one module: that of the first parameter lies inside.
            inside = "base_layer." if parameter == "gate_up_proj" and len(made) > 1 else ""
            fused |= {key(path, f"{inside}lora_A.weight"): a, key(path, f"{inside}lora_B.weight"): b}
    if len(fused) == 0 or factors:
        return dict(tensors)
    _rename_targets(model, config, set(names.values()), patterns)
    return {name: tensor for name, tensor in tensors.items() if name not in names} | fused


def _is_fused(module: nn.Module) -> bool:
    return all(getattr(module, name, torch.empty(0)).ndim == 3 for name in _FUSED) and not getattr(
        module, "is_transposed", False
    )


def _put_together(
    config: Any, path: str, weight: Tensor, block: str, layers: tuple[tuple[str, str], ...], factors: Factors
) -> tuple[Tensor, Tensor, float] | None:
    """A (E * R, in), B (out, R * E) and the scale for one tensor (E, out, in); what is used leaves `factors`."""
    experts, features_out, features_in = weight.shape
    # Rows of one layer in the stack: gate_up_proj is (E, 2 * width, dim), of which each half is `height`.
    height, scales, a_ERI, b_EOR = features_out // len(layers), set[float](), [], []
    used: list[tuple[str, int, str, str]] = []
    for expert in range(experts):
        a_parts, b_parts = [], []
        for names in layers:
            layer = next((name for name in names if (block, expert, name, "A") in factors), None)
            if layer is None:
                # A layer that isn't adapted has rows of zeros in B.
                b_parts.append(weight.new_zeros(height, 0, dtype=torch.float32, device="cpu"))
                continue
            used += [(block, expert, layer, factor) for factor in "AB"]
            a_parts.append(factors[used[-2]])
            if a_parts[-1].shape[1:] != (features_in,):
                return None
            b_parts.append(factors.get(used[-1], torch.empty(0, 0)))
            scales.add(config.scale_for(f"{path}.{expert}.{layer}"))
        if not a_parts or any(len(b) != height for b in b_parts):
            return None
        a_ERI.append(torch.cat(a_parts))
        # Each layer's B meets its own A alone: [[B1, 0], [0, B3]] (2 * width, r1 + r3).
        b_EOR.append(torch.block_diag(*b_parts).to(a_parts[0].dtype))
    # One parameter has one rank and one scale: experts that were trained with different ones have no such form.
    if len(scales) != 1 or len({a.shape for a in a_ERI}) != 1:
        return None
    for place in used:
        del factors[place]
    # In A the experts lie one after the other, in B their columns take turns: see `methods/lora/experts.py`.
    b = torch.stack(b_EOR).permute(1, 2, 0).reshape(features_out, -1)
    return torch.cat(a_ERI), b.contiguous(), scales.pop()


def _rename_targets(model: Any, config: Any, layers: set[str], patterns: Mapping[str, tuple[int, float]]) -> None:
    """Have the config name the tensors, with their ranks and scales, and the single layers no more."""
    here = {path.rpartition(".")[2] for path, _ in walk(model)}
    if isinstance(config.target_modules, set):
        config.target_modules = {name for name in config.target_modules if name not in layers - here}
    config.target_parameters = [*(config.target_parameters or []), *patterns]
    config.rank_pattern = {re.escape(name): rank for name, (rank, _) in patterns.items()} | config.rank_pattern
    config.alpha_pattern = {re.escape(name): alpha for name, (_, alpha) in patterns.items()} | config.alpha_pattern
    if config.lora_dropout and not config.inference_mode:
        warn(
            f"lora_dropout={config.lora_dropout} is 0 from here on: the experts are one tensor on this model, and it "
            "has no input that could be dropped"
        )
    config.lora_dropout = 0.0
