"""Weights in 8 bits: codes from -128 to 127 with a scale for each row or group of inputs, w = code * scale.

Linear layers and embeddings. A tied embedding and output layer hold the same codes: the one looks rows up in them, the
other multiplies by them. `LinearW8A8` rounds its inputs to 8 bits as well, each token with a scale of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.bases.integer import HoldsCodes, IntegerLinear
from slimtune.core.frozen import Base, Dense, TensorSpec
from slimtune.ops import grid, int8_kernel
from slimtune.ops.autograd import Product, is_traced
from slimtune.ops.frozen_linear import frozen_linear
from slimtune.ops.grid import GridWeight
from slimtune.storage.compressed import CODES, SCALE, ZERO


class Int8Linear(IntegerLinear):
    """8-bit codes with a scale a row, or in groups of inputs."""

    bits = 8
    most_tokens = int8_kernel.MOST_TOKENS
    module_types = ("slimtune.bases.int8.LinearInt8",)

    def hold_codes(self, codes_OI: Tensor) -> Tensor:
        return codes_OI.contiguous()

    def codes(self, module: Any) -> Tensor:
        return module.weight.data

    @torch.no_grad()
    def expand(
        self, module: Any, codes: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return grid.expand(codes, scales_OG, dtype, zeros_OG)

    def kernel(self, module: Any, dtype: torch.dtype) -> Product | None:
        if ZERO in module._buffers or not int8_kernel.takes(module.weight, module.weight_scale):
            return None
        scales_O = module.weight_scale.to(dtype).view(-1)
        return functools.partial(int8_kernel.product, codes_OI=module.weight, scales_O=scales_O)


class LinearInt8(HoldsCodes, nn.Linear):  # pyright: ignore[reportIncompatibleMethodOverride]
    """An `nn.Linear` in 8 bits."""

    packed_base = Int8Linear()


class W8A8Linear(Int8Linear):
    """Weights in 8 bits with a scale a row, and inputs in 8 bits with a scale a token, found as they come.

    The product of codes is one of whole numbers. Gradients pass through the rounding of the inputs as if it weren't
    there. A plain weight in place of the codes, as of a merge, is multiplied by rounded inputs too.
    """

    format = "int-quantized"
    parts = (CODES, SCALE)
    rounds_inputs = True
    # The kernel takes inputs as they are.
    most_tokens = 0
    module_types = ("slimtune.bases.int8.LinearW8A8",)

    def stored_as(self, module: Any) -> str:
        return "int8 (inputs too)" if self.is_packed(module) else super().stored_as(module)

    def grid_of(self, module: Any) -> tuple[int, int] | None:
        # Rounded inputs make more of the product than codes.
        return None

    def quantize(self, module: Any, weight_OI: Tensor) -> Dense:
        codes_OI, scales_OG, _ = positive_rows(weight_OI)
        return {"weight": nn.Parameter(codes_OI, requires_grad=False), SCALE: scales_OG}

    def may_fuse(self, module: Any) -> bool:
        # The fused products multiply inputs that aren't rounded.
        return False


def positive_rows(weight_OI: Tensor) -> GridWeight:
    """In 8 bits with a positive scale a row, as engines' kernels for 8 bits have them."""
    scales_OG = grid.symmetric_scales(weight_OI, weight_OI.shape[1], 8).to(grid.SCALE_DTYPE)
    return GridWeight(grid.nearest_codes(weight_OI, scales_OG, 8), scales_OG)


class LinearW8A8(HoldsCodes, nn.Linear):
    """An `nn.Linear` in 8 bits that rounds its inputs to 8 bits."""

    packed_base = W8A8Linear()

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x (..., in) to (..., out), in the dtype of x."""
        base = self.packed_base
        if not base.is_packed(self) or is_traced():
            weight_OI = base.weight(self)
            return frozen_linear(int8_kernel.on_token_grid(x), weight_OI, self.bias, None, weight_OI.dtype)
        is_cast = torch.is_autocast_enabled(x.device.type)
        y = int8_kernel.token_product(x, self.weight.data, self.weight_scale, self.bias, base.product_dtype(self, x))
        return y if is_cast else y.to(x.dtype)


class Int8Embedding(Int8Linear):
    """A lookup of rows in 8 bits with a scale a row, seen as the map from one-hot ids: W (out, in) is transposed."""

    kind = "embedding"
    is_transposed = True
    module_types = ("slimtune.bases.int8.EmbeddingInt8",)

    def features(self, module: Any) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim

    def is_packed(self, module: Any) -> bool:
        return not module.weight.is_floating_point()

    @torch.no_grad()
    def expand(
        self, module: Any, codes: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return grid.expand(codes, scales_OG, dtype, zeros_OG).t()

    def weight(self, module: Any) -> Tensor:
        return self.expansion(module)() if self.is_packed(module) else module.weight.t()

    def floating(self, module: nn.Module, name: str) -> Tensor | None:
        return self.weight(module).t() if name == "weight" else super().floating(module, name)

    def spec(self, module: Any) -> TensorSpec:
        dtype = module.compute_dtype if self.is_packed(module) else module.weight.dtype
        return TensorSpec(torch.Size((module.embedding_dim, module.num_embeddings)), dtype, module.weight.device)

    def group_size(self, module: Any) -> int:
        return module.embedding_dim // module.weight_scale.shape[1]

    def quantize(self, module: Any, weight_OI: Tensor) -> Dense:
        return super().quantize(module, weight_OI.t())

    def beyond(self, module: Any, weight_OI: Tensor) -> int:
        return super().beyond(module, weight_OI.t())

    def may_fuse(self, module: Any) -> bool:
        return False

    def make_plain(self, module: Any, weight_OI: Tensor) -> None:
        module.drop_codes()
        module.__class__ = nn.Embedding
        module._parameters["weight"] = nn.Parameter(weight_OI.t().contiguous(), requires_grad=False)


class EmbeddingInt8(HoldsCodes, nn.Embedding):
    """An `nn.Embedding` in 8 bits."""

    packed_base = Int8Embedding()

    def forward(self, ids: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The rows of these ids, (..., embedding_dim)."""
        if not self.packed_base.is_packed(self):
            return nn.Embedding.forward(self, ids)
        zeros_OG = self._buffers.get(ZERO)
        shape = (*ids.shape, self.embedding_dim)
        ids = ids.reshape(-1)
        zeros = None if zeros_OG is None else zeros_OG[ids]
        return grid.expand(self.weight.data[ids], self.weight_scale[ids], self.compute_dtype, zeros).view(shape)


BASES: tuple[Base, ...] = (Int8Linear(), W8A8Linear(), Int8Embedding())
