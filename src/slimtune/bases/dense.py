"""Plain floating-point weights: `nn.Linear`, GPT-2's `Conv1D`, `nn.Conv*d`, `nn.Embedding`, anything else as is."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from slimtune.core.frozen import Base, TensorSpec
from slimtune.ops.autograd import PLAIN_TENSORS
from slimtune.ops.reordered_linear import LinearReordered


class DenseLinear(Base):
    """`y = x W^T + b` with W stored as (out, in)."""

    kind = "linear"
    module_types = (nn.Linear,)

    def features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def spec(self, module: Any) -> TensorSpec:
        # Without its numbers, which would be written out.
        return TensorSpec(*module.looks) if isinstance(module, LinearReordered) else super().spec(module)

    def may_fuse(self, module: nn.Module) -> bool:
        return self.is_textbook(module) and is_frozen(module.weight)


class DenseConv1D(DenseLinear):
    """`y = x W + b` with W stored as (in, out): GPT-2's linear layer, which is no convolution."""

    module_types = (Conv1D,)
    is_transposed = True

    def features(self, module: Any) -> tuple[int, int]:
        return module.weight.shape[0], module.weight.shape[1]


class DenseConv(Base):
    """A convolution with W stored as (out, in / groups, kernel...)."""

    kind = "conv"
    module_types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def features(self, module: Any) -> tuple[int, int]:
        return module.in_channels, module.out_channels


class DenseEmbedding(Base):
    """A lookup of rows, seen as the map from one-hot ids: its stored (in, out) weight is read as (out, in)."""

    kind = "embedding"
    module_types = (nn.Embedding,)
    is_transposed = True

    def features(self, module: Any) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim


class Opaque(Base):
    """Any other module: its parameters can be trained whole, but no formula knows what it computes."""

    kind = "other"
    module_types = (nn.Module,)

    def features(self, module: Any) -> tuple[int, int]:
        return 0, 0


def is_frozen(weight: Any) -> bool:
    """Whether a weight is plain numbers that need no gradient."""
    # A subclass of a tensor may mean something else by a product, as a sharded or a quantized one does.
    return type(weight) in PLAIN_TENSORS and weight.is_floating_point() and not weight.requires_grad


BASES: tuple[Base, ...] = (DenseLinear(), DenseConv1D(), DenseConv(), DenseEmbedding(), Opaque())
