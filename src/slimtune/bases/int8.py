"""Weights in 8 bits: codes from -128 to 127 with a scale for each row or group of inputs, w = code * scale.

Linear layers and embeddings. A tied embedding and output layer hold the same codes: the one looks rows up in them, the
other multiplies by them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.bases.integer import HoldsCodes, IntegerLinear
from slimtune.core.delta import Base, Dense, TensorSpec
from slimtune.ops import grid
from slimtune.ops.autograd import reads_codes

MOST_TOKENS = 16
"""From here on expanding and multiplying is quicker."""
_LANES = 32
"""The kernel takes whole blocks of so many rows and columns; beyond them it reads what isn't its own."""


class Int8Linear(IntegerLinear):
    """8-bit codes with a scale a row, or in groups of inputs."""

    bits = 8
    module_types = ("slimtune.bases.int8.LinearInt8",)

    def pack(self, codes_OI: Tensor) -> Tensor:
        padded = nn.functional.pad(codes_OI, (0, -codes_OI.shape[1] % 4))
        # Each code plus 128, four an int32, the first lowest.
        return (padded.view(torch.uint8) ^ 0x80).contiguous().view(torch.int32)

    def unpack(self, packed: Tensor, inputs: int) -> Tensor:
        return (packed.contiguous().view(torch.uint8)[:, :inputs] ^ 0x80).contiguous().view(torch.int8)

    def hold_codes(self, codes_OI: Tensor) -> Tensor:
        return codes_OI.contiguous()

    def codes(self, module: Any) -> Tensor:
        return module.weight.data

    @torch.no_grad()
    def expand(self, module: Any, codes: Tensor, scales_OG: Tensor, dtype: torch.dtype) -> Tensor:
        return grid.expand(codes, scales_OG, dtype)

    def for_few_tokens(self, module: Any, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        dtype = self.product_dtype(module, x) if self.is_packed(module) else torch.float32
        if not reads_codes(x, dtype, MOST_TOKENS) or module.weight.device.type != "cpu":
            return None
        if module.weight_scale.shape[1] != 1 or module.out_features % _LANES or module.in_features % _LANES:
            return None
        scales_O = module.weight_scale.to(dtype).view(-1)

        def product(x: Tensor) -> Tensor:
            x_TI = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
            y_TO = torch.ops.aten._weight_int8pack_mm(x_TI, module.weight.data, scales_O)
            return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

        return product


class LinearInt8(HoldsCodes, nn.Linear):  # pyright: ignore[reportIncompatibleMethodOverride]
    """An `nn.Linear` in 8 bits."""

    packed_base = Int8Linear()


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
    def expand(self, module: Any, codes: Tensor, scales_OG: Tensor, dtype: torch.dtype) -> Tensor:
        return grid.expand(codes, scales_OG, dtype).t()

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
        rows, scales = self.weight.data[ids], self.weight_scale[ids]
        return rows.to(self.compute_dtype) * scales.to(self.compute_dtype)


BASES: tuple[Base, ...] = (Int8Linear(), Int8Embedding())
