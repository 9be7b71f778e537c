"""Widths made smaller, the same in every layer: feed-forward neurons, and key-value groups with their query heads.

What an input j of the layer behind contributes is sqrt(E[x_j^2]) * |W_j|, over calibration data; the smallest go. The
config of a model holds one width for all layers, so that each layer loses as many.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimtune.console.progress import Watch
from slimtune.core.roles import Role
from slimtune.errors import ConfigError
from slimtune.slim.structure import FEED_FORWARD_WIDTH, Batch, Structure, importance, kept, rebuilt, state_of

MULTIPLE = 32
"""Widths stay multiples of it where they were: 4-bit groups and fast products want them so."""


def narrow_feed_forward(model: Any, batches: Sequence[Batch], share: float, watch: Watch) -> tuple[Any, dict[str, Any]]:
    """A model with this share of its feed-forward neurons, and what became of the width.

    Raises:
        ConfigError: a share that isn't between 0 and 1 or leaves nothing, or feed-forwards of an unknown form.
    """
    structure = Structure.of(model)
    if isinstance(share, bool) or not 0 < share < 1:
        raise ConfigError(f"ffn says which share of the neurons is left, between 0 and 1, found {share!r}")
    width = _inputs(structure, "feed_forward_out")
    step = MULTIPLE if width % MULTIPLE == 0 and width > MULTIPLE else 1
    left = max(1, round(width * share / step)) * step
    if left == width:
        raise ConfigError(f"ffn {share:g} leaves all {width} neurons, in steps of {step}; take less")
    tensors = state_of(model)
    for block, scores in zip(structure.blocks, importance(structure, batches, "feed_forward_out", watch), strict=True):
        chosen = scores.topk(left).indices.sort().values
        tensors |= kept(model, tensors, structure.only(block, "feed_forward_out"), into=chosen)
        for name in block.layers["feed_forward_in"]:
            outputs = _outputs(model, name)
            if outputs not in (width, 2 * width):
                raise ConfigError(f"'{name}' has {outputs} outputs for {width} neurons, a form that is not known here")
            # Gate and up projection in one layer, one behind the other.
            both = chosen if outputs == width else torch.cat([chosen, chosen + width])
            tensors |= kept(model, tensors, name, out=both)
    config = copy.deepcopy(model.config)
    part = config.get_text_config()
    setattr(part, _field(part, width), left)
    return rebuilt(model, config, tensors), {"feed-forward neurons": left, "of": width}


def drop_kv_groups(model: Any, batches: Sequence[Batch], groups: int, watch: Watch) -> tuple[Any, dict[str, Any]]:
    """A model with so many key-value heads in each layer, each with the query heads that read it.

    Raises:
        ConfigError: as many as there are, or more, or fewer than one; or a model whose heads' width follows from
            their number, so that its config can't say it.
    """
    structure = Structure.of(model)
    part = structure.config
    heads = part.num_attention_heads
    before = getattr(part, "num_key_value_heads", None) or heads
    # BERT, ViT and GPT-2 divide the hidden size by the number of heads, whatever a config says.
    size = _head_size(structure, heads)
    if not 1 <= groups < before:
        raise ConfigError(
            f"kv-heads says how many are left, from 1 to {before - 1} of this model's {before}, found {groups}"
        )
    readers = heads // before
    tensors = state_of(model)
    for block, scores in zip(structure.blocks, importance(structure, batches, "attention_out", watch), strict=True):
        # (groups, readers * size): the inputs of the output projection by the group that they come from.
        of_group = scores.reshape(before, readers * size).square().sum(-1)
        chosen = of_group.topk(groups).indices.sort().values
        wide, narrow = _spread(chosen, readers * size), _spread(chosen, size)
        rows_of: dict[Role, Tensor] = {"query": wide, "key": narrow, "value": narrow}
        for role, rows in rows_of.items():
            tensors |= kept(model, tensors, structure.only(block, role), out=rows)
        tensors |= kept(model, tensors, structure.only(block, "attention_out"), into=wide)
    config = copy.deepcopy(model.config)
    part = config.get_text_config()
    part.num_attention_heads, part.num_key_value_heads, part.head_dim = groups * readers, groups, size
    return rebuilt(model, config, tensors), {"key-value heads": groups, "query heads": groups * readers, "of": before}


def _head_size(structure: Structure, heads: int) -> int:
    attention = structure.blocks[0].layers
    has_parts = all(len(attention.get(role, [])) == 1 for role in ("query", "key", "value", "attention_out"))
    if not has_parts or not hasattr(structure.config, "num_key_value_heads"):
        raise ConfigError(
            f"the heads of a {type(structure.model).__name__} have the hidden size divided by their number as width, "
            "so that its config can't say that there are fewer; prune its layers or feed-forward neurons"
        )
    return _outputs(structure.model, attention["query"][0]) // heads


def _spread(chosen: Tensor, size: int) -> Tensor:
    """The numbers of all rows of some groups of `size` rows."""
    return (chosen.unsqueeze(-1) * size + torch.arange(size, device=chosen.device)).flatten()


def _inputs(structure: Structure, role: Role) -> int:
    layer: Any = structure.model.get_submodule(structure.only(structure.blocks[0], role))
    return int(layer.in_features if hasattr(layer, "in_features") else layer.weight.shape[0])


def _outputs(model: Any, name: str) -> int:
    layer: Any = model.get_submodule(name)
    return int(layer.out_features if hasattr(layer, "out_features") else layer.nf)


def _field(config: Any, width: int) -> str:
    """What the config calls the feed-forward's width. Raises: ConfigError."""
    for name in FEED_FORWARD_WIDTH:
        # GPT-2 has None for four times the hidden size.
        if hasattr(config, name) and getattr(config, name) in (width, None):
            return name
    raise ConfigError(
        f"the config of a {type(config).__name__} doesn't say a feed-forward width of {width} in any known field"
    )
