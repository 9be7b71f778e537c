"""torchao's tensors: an `nn.Linear` whose weight is a tensor of another type, which expands itself.

torchao itself is imported by `slimtune.quantized.torchao`, once a model has such weights.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.bases.packed import PackedLinear
from slimtune.delta import Base


class TorchaoLinear(PackedLinear):
    """What a tensor of torchao expands to: int8 and int4 in rows or groups, float8 and whatever else has that form.

    Inputs are not quantized, also where torchao would (W8A8, W4A8): its own product loses the gradients there.
    """

    module_types = ("slimtune.quantized.torchao.TensorLinear",)

    def is_packed(self, module: Any) -> bool:
        return expands_itself(module.weight)

    def expansion(self, module: Any) -> Callable[[], Tensor]:
        from slimtune.quantized.torchao import expand

        return functools.partial(expand, module.weight)

    def dtype(self, module: Any) -> torch.dtype:
        return module.weight.dtype

    def quantize(self, module: Any, weight_OI: Tensor) -> Tensor:
        from slimtune.quantized.torchao import pack

        return pack(weight_OI, module.weight)

    def beyond(self, module: Any, weight_OI: Tensor) -> int:
        from slimtune.quantized.torchao import beyond

        return beyond(weight_OI, module.weight)


def expands_itself(weight: Any) -> bool:
    """Whether a weight is a tensor of torchao that can give its numbers back; those packed for one kernel can't."""
    library = sys.modules.get("torchao.utils")
    return (
        library is not None
        and isinstance(weight, library.TorchAOBaseTensor)
        and type(weight).dequantize is not Tensor.dequantize
    )


def claim(module: Any, dtype: torch.dtype) -> None:
    """Make an `nn.Linear` with a weight of torchao one of ours, in place, with the very same weight."""
    if type(module) is nn.Linear and expands_itself(module.weight):
        from slimtune.quantized.torchao import TensorLinear

        module.__class__ = TensorLinear
        # Put there by whoever quantized; bound to the instance, it can't be pickled.
        module.__dict__.pop("extra_repr", None)


BASES: tuple[Base, ...] = (TorchaoLinear(),)
