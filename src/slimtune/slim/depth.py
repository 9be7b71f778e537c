"""Whole layers left out: those that change their input least.

The influence of block i is 1 - E[cos(x_i, x_{i+1})] over the tokens of calibration data, x_i being the hidden states in
front of it (ShortGPT, Men et al. 2024, arXiv:2403.03853).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.console.progress import Watch
from slimtune.errors import ConfigError
from slimtune.slim.structure import Batch, Structure, rebuilt, run_through, state_of


def block_influence(structure: Structure, batches: Sequence[Batch], watch: Watch) -> list[float]:
    """How much each block changes its input: 0 for not at all."""
    sums: dict[nn.Module, list[float]] = {block.module: [0.0, 0.0] for block in structure.blocks}

    def hook_for(module: nn.Module) -> Callable[[Tensor, Tensor], None]:
        def add(x: Tensor, y: Tensor) -> None:
            alike = F.cosine_similarity(x.float(), y.float(), dim=-1)
            sums[module][0] += float((1 - alike).sum())
            sums[module][1] += alike.numel()

        return add

    run_through(structure.model, batches, {m: hook_for(m) for m in sums}, before=False, watch=watch)
    return [total / count for total, count in sums.values()]


def check_layers(layers: int, count: int) -> None:
    """Raises: ConfigError, unless at least one layer of a model's is left, and fewer than there are."""
    if not 1 <= layers < count:
        raise ConfigError(
            f"layers says how many are left, from 1 to {count - 1} of this model's {count}, found {layers}"
        )


def drop_layers(model: Any, batches: Sequence[Batch], layers: int, watch: Watch) -> tuple[Any, dict[str, Any]]:
    """A model with so many layers left, in their order, and what was chosen by which influence.

    Raises:
        ConfigError: as many layers as there are, or more, or fewer than one.
    """
    structure = Structure.of(model)
    count = len(structure.blocks)
    check_layers(layers, count)
    influence = block_influence(structure, batches, watch)
    chosen = sorted(torch.tensor(influence).topk(layers).indices.tolist())
    config = copy.deepcopy(model.config)
    part = config.get_text_config()
    for name, value in vars(part).items():
        # `layer_types` and its kin have an entry a layer.
        if isinstance(value, list) and len(value) == count and "layer" in name:
            setattr(part, name, [value[number] for number in chosen])
    part.num_hidden_layers = layers
    inside = re.compile(rf"{re.escape(structure.path)}\.(\d+)\.")
    place = {old: new for new, old in enumerate(chosen)}
    tensors = {}
    for name, tensor in state_of(model).items():
        match = inside.match(name)
        if match is None:
            tensors[name] = tensor
        elif int(match[1]) in place:
            tensors[f"{structure.path}.{place[int(match[1])]}.{name[match.end() :]}"] = tensor
    facts = {"layers": layers, "of": count, "left out": [n for n in range(count) if n not in place]}
    return rebuilt(model, config, tensors), facts | {"block_influence": [round(value, 5) for value in influence]}
