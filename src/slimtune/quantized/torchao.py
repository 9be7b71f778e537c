"""`nn.Linear` around a tensor of torchao with our product, the expansion of the tensor, and settings to quantize with.

torchao's own product is not used: where it quantizes the inputs, gradients end in it without an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torchao.quantization import (
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    MappingType,
)
from torchao.quantization.granularity import PerBlock, PerGroup
from transformers import TorchAoConfig

from slimtune.bases import claim
from slimtune.bases.packed import Packed
from slimtune.bases.torchao import TorchaoLinear
from slimtune.errors import ConfigError, MergeError, check_choice
from slimtune.quantized.settings import TORCHAO_KINDS

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
    codes = _in_blocks(weight, weight.qdata)
    if _has_zeros(weight):
        codes = codes.to(weight.dtype) - _of_blocks(weight, weight.zero_point).to(weight.dtype)
    return torch.mul(codes, _of_blocks(weight, weight.scale)).view(weight.shape).to(weight.dtype)


def _in_blocks(weight: Any, entries_OI: Tensor) -> Tensor:
    (rows, columns), (height, width) = weight.shape, weight.block_size
    return entries_OI.view(rows // height, height, columns // width, width)


def _of_blocks(weight: Any, numbers: Tensor) -> Tensor:
    """One number a block, in the shape of the blocks."""
    (rows, columns), (height, width) = weight.shape, weight.block_size
    return numbers.view(rows // height, 1, columns // width, 1)


def _has_zeros(weight: Any) -> bool:
    zeros = weight.zero_point
    # Where a compiler or a plan looks on, numbers can't be looked at.
    return zeros is not None and (torch.compiler.is_compiling() or type(zeros) is FakeTensor or bool(zeros.any()))


@torch.no_grad()
def pack(weight_OI: Tensor, like: Any) -> Tensor:
    """A weight in codes as `like` has them: in blocks of that shape, with zero points if that one has any.

    Raises:
        MergeError: another tensor of torchao.
    """
    if type(like) not in _AFFINE:
        raise MergeError(f"a {type(like).__name__} of torchao can't be made again from what it is; merge into 16 bits")
    mapping = MappingType.ASYMMETRIC if _has_zeros(like) else MappingType.SYMMETRIC
    weight_OI = weight_OI.to(like.dtype)
    if isinstance(like, IntxUnpackedToInt8Tensor):
        activations = like.activation_quantization
        return IntxUnpackedToInt8Tensor.from_hp(
            weight_OI, like.block_size, like.target_dtype, mapping_type=mapping, activation_quantization=activations
        )
    parts = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale", "reduce_range")
    own = {name: getattr(like, name) for name in parts}
    if own["act_pre_scale"] is not None:
        weight_OI = weight_OI / own["act_pre_scale"]
    return Int8Tensor.from_hp(weight_OI, PerBlock(tuple(like.block_size)), mapping, **own)


def beyond(weight_OI: Tensor, like: Any) -> int:
    """How many entries of a weight lie outside of what the codes of `like` reach with its scales."""
    codes = _in_blocks(like, weight_OI.float()) / _of_blocks(like, like.scale).float()
    if _has_zeros(like):
        codes += _of_blocks(like, like.zero_point)
    kind = getattr(like, "target_dtype", torch.int8)
    reach = 2 ** (int(str(kind).removeprefix("torch.int")) - 1)
    return int(((codes < -reach - 0.5) | (codes > reach - 0.5)).sum())


def settings(kind: str) -> TorchAoConfig:
    """What transformers loads a model with so that its linear layers are quantized by torchao.

    int8 has a scale a row, int4 a scale and a zero point for each group of 32. torchao's 4-bit codes lie in a byte
    each: that halves no memory against int8, and is for what is deployed in int4.

    Raises:
        ConfigError: another kind.
    """
    check_choice("quantize", kind, TORCHAO_KINDS)
    if kind == "int8-torchao":
        return TorchAoConfig(Int8WeightOnlyConfig())
    int4: torch.dtype = torch.int4  # pyright: ignore[reportAttributeAccessIssue]
    groups = PerGroup(_GROUP)
    return TorchAoConfig(IntxWeightOnlyConfig(int4, groups, MappingType.ASYMMETRIC))


def load_quantized(chosen: Any, source: str, settings: Any, device: str, **options: Any) -> Any:
    """`chosen.from_pretrained` with the linear layers quantized by torchao, claimed for our product.

    Raises:
        ConfigError: torchao refuses a layer, as one whose width the groups don't divide.
    """
    try:
        model = chosen.from_pretrained(source, quantization_config=settings, device_map={"": device}, **options)
    except (AssertionError, RuntimeError) as error:
        # transformers reports what torchao raised as a RuntimeError of its own.
        raise ConfigError(
            f"torchao can't quantize {source}: its groups must divide the widths of all linear layers; choose "
            "int8-torchao or nf4"
        ) from error
    claim(model)
    return model
