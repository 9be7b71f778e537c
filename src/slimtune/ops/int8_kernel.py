"""Products of 8-bit codes: with inputs as they are, and with inputs that are rounded to 8 bits a token at a time.

    x ~ q s,  s = max|x| / 127.5 of the token,  q = round(x / s) in [-128, 127];   y = s (q C^T) s_W

Sums of q C^T are whole numbers. torch multiplies int8 quickly where the processor has instructions for it (VNNI, or a
GPU); elsewhere the same codes are multiplied as float32, which is exact up to 2^24.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtune.ops.autograd import no_autocast, reads_codes

_HALF_RANGE = 127.5
"""What compressed-tensors divides by, as if all 256 codes lay around zero; vLLM's kernels divide by 127."""
MOST_TOKENS = 16
"""Up to here the kernel that reads codes of the weight and floats of the inputs is quicker."""
_LANES = 32
"""That kernel takes whole blocks of so many rows and columns; beyond them it reads what isn't its own."""
_CUDA_TOKENS, _CUDA_LANES = 17, 8
"""On a GPU, int8 products take at least so many tokens, and widths in multiples of that."""


def takes(codes_OI: Tensor, scales_OG: Tensor) -> bool:
    """Whether `product` multiplies by a weight of this shape: on a CPU, with a scale a row."""
    outputs, inputs = codes_OI.shape
    is_whole = outputs % _LANES == 0 and inputs % _LANES == 0
    return codes_OI.device.type == "cpu" and scales_OG.shape[1] == 1 and is_whole


def product(x: Tensor, codes_OI: Tensor, scales_O: Tensor) -> Tensor:
    """x W^T with x (..., in) in the dtype of the scales."""
    x_TI = x.reshape(-1, x.shape[-1]).to(scales_O.dtype).contiguous()
    # By its name in torch: `torch.ops` would take some microseconds more to find it, at each layer of each token.
    y_TO = torch._weight_int8pack_mm(x_TI, codes_OI, scales_O)  # pyright: ignore[reportPrivateImportUsage]
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


def token_codes(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as whole float32 numbers (tokens, in), and the scale of each token, (tokens, 1)."""
    wide_TI = x_TI.float()
    # From both ends and not from |x|, which would be a tensor as large again: fresh memory costs more than the sums.
    largest_T1 = torch.maximum(wide_TI.amax(-1, keepdim=True), -wide_TI.amin(-1, keepdim=True))
    # A token of zeros has codes of zeros, whatever its scale.
    scales_T1 = torch.where(largest_T1 == 0, 1.0, largest_T1 / _HALF_RANGE)
    codes_TI = wide_TI / scales_T1 if wide_TI is x_TI else wide_TI.div_(scales_T1)
    return codes_TI.round_().clamp_(-128, 127), scales_T1


def on_token_grid(x: Tensor) -> Tensor:
    """The inputs that the codes stand for; the gradient passes as if nothing were rounded."""
    codes, scales = token_codes(x.detach())
    return x + ((codes * scales).to(x.dtype) - x.detach())


def token_product(x: Tensor, codes_OI: Tensor, scales_OG: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + b with x (..., in) rounded to 8 bits, in `dtype`."""
    with no_autocast(x.device.type):
        y_TO: Any = _TokenProduct.apply(x.reshape(-1, x.shape[-1]), codes_OI, scales_OG, dtype)
        y = y_TO.view(*x.shape[:-1], y_TO.shape[-1])
        # Outside of the node, so that a bias that is trained learns.
        return y if bias_O is None else y + bias_O.to(dtype)


class _TokenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, codes_OI: Tensor, scales_OG: Tensor, dtype: torch.dtype) -> Tensor:
        # Nothing is saved but the codes, which are there anyway.
        ctx.codes_OI, ctx.scales_OG, ctx.x_dtype = codes_OI, scales_OG, x_TI.dtype
        q_TI, scales_T1 = token_codes(x_TI)
        if reads_codes(x_TI, dtype, MOST_TOKENS) and takes(codes_OI, scales_OG):
            # bfloat16 holds whole numbers up to 256.
            y_TO = product(q_TI, codes_OI, scales_OG.to(dtype).view(-1))
            return y_TO.float().mul_(scales_T1).to(dtype)
        sums_TO = _sums(q_TI, codes_OI)
        return sums_TO.mul_(scales_T1).mul_(scales_OG.t().float()).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *received: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g_TO,) = received
        with no_autocast(g_TO.device.type):
            weight_OI = ctx.codes_OI.to(g_TO.dtype) * ctx.scales_OG.to(g_TO.dtype)
            return (g_TO @ weight_OI).to(ctx.x_dtype), None, None, None


def _sums(q_TI: Tensor, codes_OI: Tensor) -> Tensor:
    """q C^T in float32."""
    if _multiplies_int8(q_TI, codes_OI):
        # torch has no public name for it.
        return torch._int_mm(q_TI.to(torch.int8), codes_OI.t()).float()  # pyright: ignore[reportPrivateImportUsage]
    return F.linear(q_TI, codes_OI.float())


def _multiplies_int8(q_TI: Tensor, codes_OI: Tensor) -> bool:
    if q_TI.device.type == "cuda":
        sizes = (*codes_OI.shape,)
        return q_TI.shape[0] >= _CUDA_TOKENS and all(size % _CUDA_LANES == 0 for size in sizes)
    return q_TI.device.type == "cpu" and _cpu_multiplies_int8()


@cache
def _cpu_multiplies_int8() -> bool:
    # Without such instructions torch's product of int8 takes ten times as long as that of float32.
    return torch.cpu._is_vnni_supported()
