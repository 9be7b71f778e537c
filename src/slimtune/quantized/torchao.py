"""`nn.Linear` around a tensor of torchao with our product, the expansion of the tensor, and settings to quantize with.

torchao's own product is not used: where it quantizes the inputs, gradients end in it without an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import (
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    MappingType,
)
from torchao.quantization.granularity import PerGroup
from transformers import TorchAoConfig

from slimtune.bases.packed import Packed
from slimtune.bases.torchao import TorchaoLinear
from slimtune.errors import check_choice

KINDS = ("int8-torchao", "int4-torchao")
"""int8 with a scale a row; int4 with a scale and a zero point for each group of 32."""

_GROUP = 32
_AFFINE = (Int8Tensor, IntxUnpackedToInt8Tensor)
"""w = (code - zero point) * scale of its block."""


class TensorLinear(Packed, nn.Linear):  # pyright: ignore[reportIncompatibleMethodOverride]
    """An `nn.Linear` whose weight is a tensor of torchao: the product with the expanded weight."""

    packed_base = TorchaoLinear()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={type(self.weight).__name__}"


@torch.no_grad()
def expand(weight: Any) -> Tensor:
    """The weight (out, in) in the dtype that it had, equal to torchao's `dequantize` bit for bit.

    A factor of the inputs, as SmoothQuant and AWQ have it, is taken into the weight.
    """
    dense_OI = _affine(weight) if type(weight) in _AFFINE else weight.dequantize()
    factor_I = getattr(weight, "act_pre_scale", None)
    return dense_OI if factor_I is None else dense_OI.mul_(factor_I)


def _affine(weight: Any) -> Tensor:
    # As torchao has it, less the pass over all codes for zero points that are zero and a copy.
    (rows, columns), (height, width) = weight.shape, weight.block_size
    blocks = rows // height, 1, columns // width, 1
    codes, zeros = weight.qdata.view(rows // height, height, columns // width, width), weight.zero_point
    if zeros is not None and zeros.any():
        codes = codes.to(weight.dtype) - zeros.view(blocks).to(weight.dtype)
    return torch.mul(codes, weight.scale.view(blocks)).view(rows, columns).to(weight.dtype)


def settings(kind: str) -> TorchAoConfig:
    """What transformers loads a model with so that its linear layers are quantized by torchao.

    torchao's 4-bit codes lie in a byte each: that halves no memory against int8, and is for what is deployed in int4.

    Raises:
        ConfigError: another kind.
    """
    check_choice("quantize", kind, KINDS)
    if kind == "int8-torchao":
        return TorchAoConfig(Int8WeightOnlyConfig())
    int4: torch.dtype = torch.int4  # pyright: ignore[reportAttributeAccessIssue]
    groups = PerGroup(_GROUP)
    return TorchAoConfig(IntxWeightOnlyConfig(int4, groups, MappingType.ASYMMETRIC))
