"""SmolLM2 off the grid that its packaged weights lie on: the same function, in weights that no 4-bit grid fits.

The packaged model was a Q4_1 GGUF, so that the weights of each group of 32 have at most 16 values, and what lies near
that grid loses little on it. Channels are scaled by exp(0.15 N(0, 1)), which is undone in the norm, `up_proj` or
`v_proj` that feeds them. AWQ can take a part of such a scaling back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SPREAD = 0.15


@torch.no_grad()
def off_grid_(model: Any, seed: int = 0) -> Any:
    """Scale the channels of a Llama in place."""
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> Tensor:
        return torch.exp(SPREAD * torch.randn(count, generator=generator))

    def scale(weight: Tensor, by: Tensor) -> None:
        weight.copy_(weight.float() * by)

    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, linears in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            by = factors(norm.weight.numel())
            scale(norm.weight, 1 / by)
            for linear in linears:
                scale(linear.weight, by)
        by = factors(mlp.up_proj.out_features)
        scale(mlp.up_proj.weight, (1 / by)[:, None])
        scale(mlp.down_proj.weight, by)
        by = factors(attention.v_proj.out_features)
        scale(attention.v_proj.weight, (1 / by)[:, None])
        # Each group of key and value heads serves several query heads.
        repeated = by.view(groups, 1, -1).expand(groups, heads // groups, -1).reshape(-1)
        scale(attention.o_proj.weight, repeated)
    return model
