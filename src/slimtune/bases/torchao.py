"""torchao's tensors: an `nn.Linear` whose weight is a tensor of another type, which expands itself.

The module is re-classed with the very same weight. torchao's own product is not used: where it quantizes the inputs
(W8A8, W4A8), gradients end in it without an error. Inputs are therefore never quantized here.

This file imports torchao, which takes seconds; it is itself imported once a model has a weight from there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, MappingType
from torchao.quantization.granularity import PerBlock
from torchao.utils import TorchAOBaseTensor

from slimtune import bases
from slimtune.bases.packed import Packed, PackedLinear
from slimtune.core.frozen import Base, Dense
from slimtune.errors import ConfigError, MergeError, ModelNotFoundError
from slimtune.storage.foreign import reading_model

_AFFINE = (Int8Tensor, IntxUnpackedToInt8Tensor)
"""w = (code - zero point) * scale of its block."""


def expands_itself(weight: Any) -> bool:
    """Whether a weight is a tensor of torchao that can give its numbers back; those packed for one kernel can't."""
    return isinstance(weight, TorchAOBaseTensor) and type(weight).dequantize is not Tensor.dequantize


@torch.no_grad()
def expand(weight: Any) -> Tensor:
    """The weight (out, in) in the dtype that it had, equal to torchao's `dequantize` bit for bit.

    A factor of the inputs, as SmoothQuant and AWQ have it, is taken into the weight.
    """
    dense_OI = _affine(weight) if type(weight) in _AFFINE else weight.dequantize()
    factor_I = getattr(weight, "act_pre_scale", None)
    # x * f before the product is W * f by columns.
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
    if zeros is None:
        return False
    if type(zeros) is FakeTensor:
        # A plan has no numbers to look at: of `torchao_settings`, int4 has zero points and int8 none but zeros.
        return isinstance(weight, IntxUnpackedToInt8Tensor)
    # Where a compiler looks on, numbers can't be looked at.
    return torch.compiler.is_compiling() or bool(zeros.any())


@torch.no_grad()
def pack(weight_OI: Tensor, like: Any) -> Tensor:
    """A weight in codes as `like` has them: in blocks of that shape, with zero points if that one has any.

    Raises:
        MergeError: another tensor of torchao.
    """
    if type(like) not in _AFFINE:
        raise MergeError(f"a {type(like).__name__} of torchao can't be made again from what it is; merge into 16 bits")
    # A tensor doesn't say how it was mapped; zero points that are all zero are those of a symmetric one.
    mapping = MappingType.ASYMMETRIC if _has_zeros(like) else MappingType.SYMMETRIC
    weight_OI = weight_OI.to(like.dtype)
    if isinstance(like, IntxUnpackedToInt8Tensor):
        activations = like.activation_quantization
        return IntxUnpackedToInt8Tensor.from_hp(
            weight_OI, like.block_size, like.target_dtype, mapping_type=mapping, activation_quantization=activations
        )
    parts = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale", "reduce_range")
    own = {name: getattr(like, name) for name in parts}
    # Taken into the weight when it was expanded, so taken out of it here.
    if own["act_pre_scale"] is not None:
        weight_OI = weight_OI / own["act_pre_scale"]
    return Int8Tensor.from_hp(weight_OI, PerBlock(tuple(like.block_size)), mapping, **own)


def beyond(weight_OI: Tensor, like: Any) -> int:
    """How many entries of a weight lie outside of what the codes of `like` reach with its scales."""
    codes = _in_blocks(like, weight_OI.float()) / _of_blocks(like, like.scale).float()
    if _has_zeros(like):
        codes += _of_blocks(like, like.zero_point)
    kind = getattr(like, "target_dtype", torch.int8)
    # -128 to 127 of int8, -8 to 7 of int4; half a code beyond is rounded into the range.
    reach = 2 ** (int(str(kind).removeprefix("torch.int")) - 1)
    return int(((codes < -reach - 0.5) | (codes > reach - 0.5)).sum())


class TorchaoLinear(PackedLinear):
    """What a tensor of torchao expands to: int8 and int4 in rows or groups, float8 and whatever else has that form."""

    module_types = ("slimtune.bases.torchao.TensorLinear",)

    def is_packed(self, module: Any) -> bool:
        return expands_itself(module.weight)

    def expansion(self, module: Any) -> Callable[[], Tensor]:
        return functools.partial(expand, module.weight)

    def dtype(self, module: Any) -> torch.dtype:
        return module.weight.dtype

    def quantize(self, module: Any, weight_OI: Tensor) -> Dense:
        return {"weight": pack(weight_OI, module.weight)}

    def beyond(self, module: Any, weight_OI: Tensor) -> int:
        return beyond(weight_OI, module.weight)


class TensorLinear(Packed, nn.Linear):  # pyright: ignore[reportIncompatibleMethodOverride]
    """An `nn.Linear` whose weight is a tensor of torchao: the product with the expanded weight."""

    packed_base = TorchaoLinear()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={type(self.weight).__name__}"


def claim(module: Any, dtype: torch.dtype) -> None:
    """Make an `nn.Linear` with a weight of torchao one of ours, in place, with the very same weight."""
    # Other libraries, as compressed-tensors, hold the codes of an `nn.Linear` by other names.
    if type(module) is nn.Linear and expands_itself(getattr(module, "weight", None)):
        module.__class__ = TensorLinear
        # Put there by whoever quantized; bound to the instance, it can't be pickled.
        module.__dict__.pop("extra_repr", None)


def load_quantized(chosen: Any, source: str, settings: Any, device: str, **options: Any) -> Any:
    """`chosen.from_pretrained` with the linear layers quantized by torchao, claimed for our product.

    Raises:
        ConfigError: torchao refuses a layer, as one whose width the groups don't divide.
    """
    try:
        with reading_model("the model", source):
            model = chosen.from_pretrained(source, quantization_config=settings, device_map={"": device}, **options)
    except ModelNotFoundError as error:
        if not isinstance(error.__cause__, AssertionError | RuntimeError):
            raise
        # transformers reports what torchao raised as a RuntimeError of its own.
        raise ConfigError(
            f"torchao can't quantize {source}: its groups must divide the widths of all linear layers; choose "
            "int8-torchao or nf4"
        ) from error
    bases.claim(model)
    return model


BASES: tuple[Base, ...] = (TorchaoLinear(),)
