"""A dense update of a dense linear layer in one product: y = x (W + s dW)^T + b.

Saved are the input and the factors of the update, which is made again in the backward pass: no second matrix of the
weight's size is kept for each layer. In 16 bits W + s dW would be rounded to W, so that there the products stay two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimtune.bases import base_of
from slimtune.bases.dense import PLAIN_TENSORS, DenseLinear
from slimtune.delta import Frozen
from slimtune.methods.loha import LohaLinear
from slimtune.methods.lycoris import updated_product
from slimtune.ops import fuses


@fuses(LohaLinear, DenseLinear)
def dense_update(delta: LohaLinear, module: Any, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`base(x) + s dW x`, fused where the base is a plain frozen product in the adapter's precision."""
    weight_OI = base.weight
    drops = delta.training and (delta.rank_dropout or delta.module_dropout)
    if args or kwargs or drops or not _is_plain(module, weight_OI, x, delta.factors[0].dtype):
        return delta.forward(base, x, *args, **kwargs)
    return updated_product(delta.update, x, weight_OI, module.bias, *delta.factors)


def _is_plain(module: Any, weight: Tensor, x: Any, dtype: torch.dtype) -> bool:
    return (
        type(x) in PLAIN_TENSORS
        and x.dtype == weight.dtype == dtype
        and dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(x.device.type)
        and base_of(module).may_fuse(module)
    )
