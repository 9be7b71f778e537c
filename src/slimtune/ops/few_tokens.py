"""Products with few tokens, as in decoding: kernels that read the codes, where expanding them would be nearly all work.

bitsandbytes' kernel for the CPU wants 4-bit codes in another order and block maxima in bfloat16. Such a copy lives
beside the codes from the first answer until the module learns again; the codes themselves stay as they are.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from bitsandbytes.autograd._functions import matmul_4bit
from bitsandbytes.functional import _convert_weight_packed_for_cpu, gemv_4bit, has_avx512bf16
from torch import Tensor, nn

from slimtune.ops import int8_kernel
from slimtune.ops.autograd import Product, reads_codes

MOST_TOKENS = 16
"""Where expanding and multiplying catches up, by `python -m benchmarks.decoding`."""
_LANES = 32
"""The kernels take whole blocks of so many rows and columns; beyond them they read what isn't theirs."""


@dataclass(frozen=True)
class _Copy:
    """Codes in another order, and what they were made from."""

    weight: Tensor
    absmax: Tensor
    versions: tuple[int, int]
    codes: Tensor
    state: Any

    def is_of(self, weight: Tensor, absmax: Tensor) -> bool:
        """Whether these are still the codes, unchanged; they are kept, so that their place can't be another's."""
        same = self.weight.data_ptr() == weight.data_ptr() and self.absmax is absmax
        return same and self.versions == (weight._version, absmax._version)


_COPIES: WeakKeyDictionary[nn.Module, _Copy] = WeakKeyDictionary()


def few_tokens_4bit(module: Any, state: Any, x: Tensor, dtype: torch.dtype) -> Product | None:
    """y = x W^T on 4-bit codes, x (..., in) in bfloat16, or None where expanding is quicker or has to be."""
    if torch.is_grad_enabled():
        # Learning reads the codes as they are: a second copy of them would double the base for as long as it learns.
        _COPIES.pop(module, None)
    if not reads_codes(x, dtype, MOST_TOKENS):
        return None
    if x.device.type != "cpu":
        # On other devices bitsandbytes' kernels read the codes in the order in which they are stored.
        return lambda x: matmul_4bit(x.to(dtype), module.weight.t(), quant_state=state)
    outputs, inputs = state.shape
    # What was made in inference mode can change without a trace.
    is_tracked = not (module.weight.is_inference() or state.absmax.is_inference())
    if not is_tracked or outputs % _LANES or inputs % max(_LANES, state.blocksize) or not has_avx512bf16():
        return None
    codes, reordered = _reordered(module, state)
    return lambda x: gemv_4bit(x.to(dtype).contiguous(), codes, state=reordered)


def few_tokens_8bit(codes_OI: Tensor, scales_O: Tensor, x: Tensor, dtype: torch.dtype) -> Product | None:
    """y = x W^T on int8 codes with a scale a row; else as `few_tokens_4bit`."""
    if not reads_codes(x, dtype, MOST_TOKENS) or not int8_kernel.takes(codes_OI, scales_O[:, None]):
        return None
    # w = code * scale / 127, which the kernel wants as one factor a row in the dtype of x.
    scales = (scales_O / 127).to(dtype)
    return functools.partial(int8_kernel.product, codes_OI=codes_OI.data, scales_O=scales)


def _reordered(module: Any, state: Any) -> tuple[Tensor, Any]:
    """The codes as the kernel for the CPU reads them, made once for as long as they stay what they are."""
    weight, absmax = module.weight, state.absmax
    known = _COPIES.get(module)
    if known is None or not known.is_of(weight, absmax):
        # Of a copy of the state: the conversion writes rounded block maxima into what it is given, and the exact ones
        # are what training expands by.
        codes, reordered = _convert_weight_packed_for_cpu(weight.data, copy.copy(state))
        versions = weight._version, absmax._version
        known = _COPIES[module] = _Copy(weight.detach(), absmax, versions, codes, reordered)
    return known.codes, known.state
