"""Quantized linear layers: the weight is kept as codes and expanded for each product, in forward and in backward.

The module that another library made is re-classed to one of ours on the very same storage: what is stored stays that
library's, the product is ours. Nothing expanded outlives the product that it is expanded for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slimtune.core.frozen import Base, Dense, TensorSpec
from slimtune.errors import MergeError
from slimtune.ops.frozen_linear import frozen_linear


def as_linear(module: Any) -> nn.Linear:
    """Make GPT-2's `Conv1D`, in place, the `nn.Linear` of the same product; a linear layer stays as it is.

    It remembers what it was, as bitsandbytes' layers do (`source_cls`).
    """
    layer: Any = module
    if isinstance(module, Conv1D):
        layer.in_features, layer.out_features, layer.source_cls = layer.nx, layer.nf, Conv1D
        del layer.nx, layer.nf
        needs_gradient = layer.weight.requires_grad
        layer._parameters["weight"] = nn.Parameter(layer.weight.detach().t().contiguous(), needs_gradient)
        layer.__class__ = nn.Linear
    return layer


class PackedLinear(Base):
    """`y = x W^T + b` with W (out, in) stored as codes.

    A floating-point weight in its place, as after a merge, is taken as it is.
    """

    kind = "linear"

    def features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    @abstractmethod
    def expansion(self, module: Any) -> Callable[[], Tensor]:
        """What expands the stored codes as (out, in)."""

    @abstractmethod
    def dtype(self, module: Any) -> torch.dtype:
        """What a packed module computes in."""

    def is_packed(self, module: Any) -> bool:
        """Whether the weight is stored as codes now."""
        weight = module.weight
        # A merge puts a plain weight in the place of the codes, (out, in) in floating point; codes have neither.
        return not (weight.is_floating_point() and tuple(weight.shape) == (module.out_features, module.in_features))

    def grid_of(self, module: Any) -> tuple[int, int] | None:
        """Bits and group size of codes that stand for w = code * scale; None for any others."""
        return None

    def stored_as(self, module: Any) -> str:
        """The type of a packed weight: 'Int8Tensor'."""
        return type(module.weight).__name__ if self.is_packed(module) else super().stored_as(module)

    def dequantizer(self, module: Any) -> Callable[[], Tensor] | None:
        return self.expansion(module) if self.is_packed(module) else None

    def weight(self, module: Any) -> Tensor:
        return self.expansion(module)() if self.is_packed(module) else module.weight

    def spec(self, module: Any) -> TensorSpec:
        if not self.is_packed(module):
            return super().spec(module)
        shape = torch.Size((module.out_features, module.in_features))
        return TensorSpec(shape, self.dtype(module), module.weight.device)

    def product_dtype(self, module: Any, x: Tensor) -> torch.dtype:
        """What a product of codes with x is computed in: the dtype of autocast where that is on."""
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype(module)

    def floating(self, module: nn.Module, name: str) -> Tensor | None:
        return self.weight(module) if name == "weight" else super().floating(module, name)

    def is_textbook(self, module: nn.Module) -> bool:
        return isinstance(module, Packed)

    def make_plain(self, module: Any, weight_OI: Tensor) -> None:
        """Make the module, in place, what it was before it was quantized, an `nn.Linear` or GPT-2's `Conv1D`."""
        is_conv1d = issubclass(module.__dict__.pop("source_cls", nn.Linear), Conv1D)
        if is_conv1d:
            module.nx, module.nf = module.in_features, module.out_features
            del module.in_features, module.out_features
            weight_OI = weight_OI.t().contiguous()
        module.__class__ = Conv1D if is_conv1d else nn.Linear
        module._parameters["weight"] = nn.Parameter(weight_OI, requires_grad=False)

    def quantize(self, module: Any, weight_OI: Tensor) -> Dense:
        """The tensors that the module stores for another weight, with its own settings and new scales.

        Nothing is changed.

        Raises:
            MergeError: there is no way back into these codes.
        """
        raise self._no_way_back(module)

    def beyond(self, module: Any, weight_OI: Tensor) -> int:
        """How many entries of another weight the scales that the module has can't reach. Raises: as `quantize`."""
        raise self._no_way_back(module)

    def _no_way_back(self, module: Any) -> MergeError:
        return MergeError(f"a {type(module).__name__} can't be quantized again here; merge into 16 bits")

    def sync_state(self, module: Any) -> None:
        """Let the module's own references to its codes and scales follow a weight that was put into it."""

    def may_fuse(self, module: Any) -> bool:
        return self.is_textbook(module) and (self.is_packed(module) or not module.weight.requires_grad)


class Packed:
    """Mixed in front of a module that another library quantized: the product of its expanded weight, no more.

    Attributes:
        packed_base: what expands the weight.
    """

    packed_base: PackedLinear

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in the dtype of x."""
        module: Any = self
        base = module.packed_base
        product = base.for_few_tokens(module, x)
        if product is not None:
            y = product(x)
            # Apart: the kernels that read codes take no bias.
            y = y if module.bias is None else y + module.bias.to(y.dtype)
            return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)
        # Expanded for this product, and once more for its backward; never kept between the two.
        return frozen_linear(x, base.weight(module), module.bias, base.dequantizer(module), base.spec(module).dtype)


BASES: tuple[Base, ...] = ()
