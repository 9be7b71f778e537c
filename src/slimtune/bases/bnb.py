"""bitsandbytes' storage: NF4 and FP4, with and without double quantization, and int8.

bitsandbytes itself is imported by `slimtune.quantized.bnb`, once a model has such modules.
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


class BnbLinear(PackedLinear):
    """What both storages have in common."""

    def make_plain(self, module: Any, weight_OI: Tensor) -> None:
        from slimtune.quantized.bnb_storage import give_up_storage

        give_up_storage(module, weight_OI)


class Bnb4bitLinear(BnbLinear):
    """4-bit codes in blocks, each with the largest magnitude in it: w = codebook[code] * absmax of its block."""

    module_types = ("bitsandbytes.nn.modules.Linear4bit",)

    def code(self, module: Any) -> str:
        return state_of(module).quant_type

    def held(self, module: Any) -> list[Tensor]:
        state = state_of(module)
        if state is None:
            return super().held(module)
        nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
        return [*super().held(module), state.absmax, state.code, *nested]

    def is_packed(self, module: Any) -> bool:
        return state_of(module) is not None and super().is_packed(module)

    def expansion(self, module: Any) -> Callable[[], Tensor]:
        from slimtune.quantized.bnb import expand_4bit

        return functools.partial(expand_4bit, module.weight, state_of(module))

    def for_few_tokens(self, module: Any, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        if not self.is_packed(module):
            return None
        from slimtune.quantized.few_tokens import few_tokens_4bit

        return few_tokens_4bit(module, state_of(module), x, self.product_dtype(module, x))

    def dtype(self, module: Any) -> torch.dtype:
        return module.compute_dtype or state_of(module).dtype

    def quantize(self, module: Any, weight_OI: Tensor) -> Tensor:
        from slimtune.quantized.packing import packed_4bit

        state = state_of(module)
        dense_OI, storage = weight_OI.to(state.dtype), module.weight.dtype
        return packed_4bit(dense_OI, state.blocksize, state.quant_type, state.nested, storage)

    def beyond(self, module: Any, weight_OI: Tensor) -> int:
        from slimtune.quantized.bnb_storage import block_maxima

        state = state_of(module)
        reach = block_maxima(state).repeat_interleave(state.blocksize)[: weight_OI.numel()]
        # The largest of a block is its maximum, rounded as the weight is.
        return int((weight_OI.reshape(-1).abs() > reach * (1 + 2 * torch.finfo(state.dtype).eps)).sum())

    def settle(self, module: Any) -> None:
        module.weight.module, module.quant_state = module, module.weight.quant_state


class Bnb8bitLinear(BnbLinear):
    """int8 codes with one scale a row: w = code * scale / 127."""

    module_types = ("bitsandbytes.nn.modules.Linear8bitLt",)

    def code(self, module: Any) -> str:
        return "int8"

    def held(self, module: Any) -> list[Tensor]:
        return [*super().held(module), *([scales_of(module)] if self.is_packed(module) else [])]

    def is_packed(self, module: Any) -> bool:
        return module.weight.dtype == torch.int8

    def expansion(self, module: Any) -> Callable[[], Tensor]:
        from slimtune.quantized.bnb import expand_8bit

        return functools.partial(expand_8bit, module.weight, scales_of(module), self.dtype(module))

    def for_few_tokens(self, module: Any, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        if not self.is_packed(module):
            return None
        from slimtune.quantized.few_tokens import few_tokens_8bit

        return few_tokens_8bit(module.weight, scales_of(module), x, self.product_dtype(module, x))

    def dtype(self, module: Any) -> torch.dtype:
        # bitsandbytes doesn't store what the weight was before; what the model computes in is noted when it is claimed.
        return getattr(module, "compute_dtype", None) or torch.get_default_dtype()

    def quantize(self, module: Any, weight_OI: Tensor) -> Tensor:
        from slimtune.quantized.bnb_storage import pack_8bit

        return pack_8bit(weight_OI)

    def beyond(self, module: Any, weight_OI: Tensor) -> int:
        # A code of 127.5 would be rounded beyond the last one.
        return int((weight_OI.abs() > scales_of(module)[:, None] * (127.5 / 127)).sum())

    def settle(self, module: Any) -> None:
        module.state.CB = module.state.SCB = None


def state_of(module: Any) -> Any:
    """The quantization state of a 4-bit module, or None where its weight isn't quantized."""
    own = getattr(module.weight, "quant_state", None)
    # FSDP makes plain parameters of the weights; the module keeps the state.
    return own if own is not None or module.weight.dtype != module.quant_storage else module.quant_state


def scales_of(module: Any) -> Tensor:
    """The scale of each row of an int8 module."""
    own = getattr(module.weight, "SCB", None)
    return module.state.SCB if own is None else own


def claim(module: nn.Module, dtype: torch.dtype) -> None:
    """Make a module of bitsandbytes one of ours, in place, with the same storage."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None or not isinstance(module, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt):
        return
    from slimtune.quantized.bnb import adopt_storage

    adopt_storage(module, dtype)


BASES: tuple[Base, ...] = (Bnb4bitLinear(), Bnb8bitLinear())
