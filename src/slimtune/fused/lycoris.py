"""LoHa and LoKr on a frozen linear layer, in the base's precision: y = x W^T + b + x (s dW)^T.

Saved are the input and the factors of the update, of which all else is made again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimtune.bases.dense import DenseLinear
from slimtune.bases.packed import PackedLinear
from slimtune.core.frozen import Frozen
from slimtune.fused import fuses
from slimtune.fused.lora import stays_plain
from slimtune.methods.lycoris.base import LycorisDelta, recomputed, updated_product
from slimtune.methods.lycoris.loha import LohaLinear
from slimtune.methods.lycoris.lokr import LokrLinear


@fuses(LohaLinear, PackedLinear)
@fuses(LohaLinear, DenseLinear)
def loha_linear(delta: LohaLinear, module: Any, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`base(x) + s dW x`, with dW made in its own precision and rounded once."""
    if args or kwargs or _drops(delta) or stays_plain(delta, module, base, x):
        return delta.forward(base, x, *args, **kwargs)
    # One product with W + s dW. In 16 bits that sum would be rounded to W: there each has a product of its own.
    if is_of_one_dtype(module, base, x):
        return updated_product(delta.update, x, base.weight, module.bias, *delta.factors)

    def rounded(*factors: Tensor) -> Tensor:
        # dW is made of its float32 factors in float32, and rounded once, for a product in the base's dtype (ADR 6).
        return delta.update(*factors).to(x.dtype)

    return base(x) + updated_product(rounded, x, None, None, *delta.factors)


@fuses(LokrLinear, PackedLinear)
@fuses(LokrLinear, DenseLinear)
def lokr_linear(delta: LokrLinear, module: Any, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`base(x) + s * W1 X W2^T`, in the precision of x."""
    if args or kwargs or _drops(delta) or stays_plain(delta, module, base, x):
        return delta.forward(base, x, *args, **kwargs)
    # W1 (x) W2 is (out, in) and never made: its small factors are multiplied with x from either side.
    return base(x) + recomputed(delta.multiplied, x, *delta.factors)


def is_of_one_dtype(module: Any, base: Frozen, x: Tensor) -> bool:
    """Whether the weight is stored as what x is multiplied with it in."""
    is_dense = base.base.dequantizer(module) is None and x.dtype == base.weight.dtype
    return is_dense and not torch.is_autocast_enabled(x.device.type)


def _drops(delta: LycorisDelta) -> bool:
    return bool(delta.training and (delta.rank_dropout or delta.module_dropout))
