"""Tiny denoising models of diffusers, with an input for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def unet(cross_attention_dim: int = 16) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
    )


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=8,
    )


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 4, 8),
    )


def unet_inputs() -> dict[str, Any]:
    return {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 9]),
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }


def sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 9]),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 12),
    }


def flux_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 6, 4),
        "timestep": torch.tensor([0.3, 0.9]),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 12),
        "img_ids": torch.randn(6, 3),
        "txt_ids": torch.randn(5, 3),
    }


@dataclass(frozen=True)
class Denoiser:
    """A denoising model, an input for it, and what a pipeline calls it."""

    part: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]

    def model(self) -> Any:
        torch.manual_seed(0)
        return self.build().eval()

    def batch(self) -> dict[str, Any]:
        torch.manual_seed(1)
        return self.inputs()

    @torch.no_grad()
    def predict(self, model: nn.Module) -> Tensor:
        return model.eval()(**self.batch())[0]


UNET = Denoiser("unet", unet, unet_inputs)
DENOISERS = {
    "unet": UNET,
    "sd3": Denoiser("transformer", sd3, sd3_inputs),
    "flux": Denoiser("transformer", flux, flux_inputs),
}
