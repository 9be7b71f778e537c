"""bitsandbytes' storage: NF4 and FP4, with and without double quantization, and int8.

A module of bitsandbytes is re-classed on the very same storage, and the product is ours. Its own `Linear4bit.forward`
is not used: on CPUs with AVX512-BF16 one evaluation repacks the weights in place, after which training loses gradients
without an error, and a model that is saved has lost the exact block maxima.

Weights are expanded to the same numbers as bitsandbytes' own, bit for bit, and quantized to the same codes, on a CPU a
piece at a time: whole, a weight takes ten times its size there while it is quantized, and more time.

What was stored is checked before it is used: bitsandbytes' kernels read past the end of what is too short.

This file imports bitsandbytes, which takes seconds; it is itself imported once a model has a module from there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from bitsandbytes.functional import (
    QuantState,
    _convert_weight_packed_for_cpu_inverse,
    dequantize_blockwise,
    get_4bit_type,
    int8_vectorwise_quant,
    quantize_blockwise,
)
from bitsandbytes.nn.modules import Int8Params, Params4bit
from bitsandbytes.nn.modules import Linear4bit as Stored4bit
from bitsandbytes.nn.modules import Linear8bitLt as Stored8bit
from torch import Tensor

from slimtune.bases.packed import Packed, PackedLinear
from slimtune.core.frozen import Base, Dense
from slimtune.errors import DamagedBaseError, MergeError
from slimtune.ops.few_tokens import few_tokens_4bit, few_tokens_8bit

_NOTED = (
    "compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu",
    "state", "index",
)  # fmt: skip
"""What bitsandbytes and transformers note in a quantized module."""


class BnbLinear(PackedLinear):
    """What both storages have in common."""

    def make_plain(self, module: Any, weight_OI: Tensor) -> None:
        for name in _NOTED:
            module.__dict__.pop(name, None)
        # They would look for codes in the state dict of what is a plain layer now.
        hooks = module._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "__module__", "").startswith("bitsandbytes")]:
            del hooks[key]
        super().make_plain(module, weight_OI)


class Bnb4bitLinear(BnbLinear):
    """4-bit codes in blocks, each with the largest magnitude in it: w = codebook[code] * absmax of its block."""

    module_types = ("bitsandbytes.nn.modules.Linear4bit",)

    def stored_as(self, module: Any) -> str:
        return state_of(module).quant_type if self.is_packed(module) else super().stored_as(module)

    def held(self, module: Any) -> list[Tensor]:
        state = state_of(module)
        if state is None:
            return super().held(module)
        nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
        return [*super().held(module), state.absmax, state.code, *nested]

    def is_packed(self, module: Any) -> bool:
        return state_of(module) is not None and super().is_packed(module)

    def expansion(self, module: Any) -> Callable[[], Tensor]:
        return functools.partial(expand_4bit, module.weight, state_of(module))

    def for_few_tokens(self, module: Any, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        if not self.is_packed(module):
            return None
        # Decoding: expanding (out, in) weights for one token would be nearly all of its work.
        return few_tokens_4bit(module, state_of(module), x, self.product_dtype(module, x))

    def dtype(self, module: Any) -> torch.dtype:
        return module.compute_dtype or state_of(module).dtype

    def quantize(self, module: Any, weight_OI: Tensor) -> Dense:
        state = state_of(module)
        # Rounded to the dtype that expansion gives first, as bitsandbytes had it when it quantized the base.
        dense_OI, storage = weight_OI.to(state.dtype), module.weight.dtype
        return {"weight": packed_4bit(dense_OI, state.blocksize, state.quant_type, state.nested, storage)}

    def beyond(self, module: Any, weight_OI: Tensor) -> int:
        state = state_of(module)
        reach = block_maxima(state).repeat_interleave(state.blocksize)[: weight_OI.numel()]
        # The largest of a block is its maximum, rounded as the weight is.
        return int((weight_OI.reshape(-1).abs() > reach * (1 + 2 * torch.finfo(state.dtype).eps)).sum())

    def sync_state(self, module: Any) -> None:
        # bitsandbytes' parameter leads back to its module, and the module to the state: both after a copy or a merge.
        module.weight.module, module.quant_state = module, module.weight.quant_state


class Bnb8bitLinear(BnbLinear):
    """int8 codes with one scale a row: w = code * scale / 127."""

    module_types = ("bitsandbytes.nn.modules.Linear8bitLt",)

    def stored_as(self, module: Any) -> str:
        return "int8" if self.is_packed(module) else super().stored_as(module)

    def held(self, module: Any) -> list[Tensor]:
        return [*super().held(module), *([scales_of(module)] if self.is_packed(module) else [])]

    def is_packed(self, module: Any) -> bool:
        return module.weight.dtype == torch.int8

    def expansion(self, module: Any) -> Callable[[], Tensor]:
        return functools.partial(expand_8bit, module.weight, scales_of(module), self.dtype(module))

    def for_few_tokens(self, module: Any, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        if not self.is_packed(module):
            return None
        return few_tokens_8bit(module.weight, scales_of(module), x, self.product_dtype(module, x))

    def dtype(self, module: Any) -> torch.dtype:
        # bitsandbytes doesn't store what the weight was before; what the model computes in is noted when it is claimed.
        return getattr(module, "compute_dtype", None) or torch.get_default_dtype()

    def quantize(self, module: Any, weight_OI: Tensor) -> Dense:
        largest = weight_OI.abs().max().item()
        # bitsandbytes quantizes by way of float16, in which more is infinite.
        if largest > torch.finfo(torch.float16).max:
            raise MergeError(
                f"the merged weight has an entry of {largest:.3g}, which bitsandbytes can't quantize to int8; merge "
                "into 16 bits"
            )
        return {"weight": packed_8bit(weight_OI)}

    def beyond(self, module: Any, weight_OI: Tensor) -> int:
        # A code of 127.5 would be rounded beyond the last one.
        return int((weight_OI.abs() > scales_of(module)[:, None] * (127.5 / 127)).sum())

    def sync_state(self, module: Any) -> None:
        # bitsandbytes would go on with the codes that its state remembers.
        module.state.CB = module.state.SCB = None


class Linear4bit(Packed, Stored4bit):
    """NF4 or FP4: what bitsandbytes stores, the product with the expanded weight."""

    packed_base = Bnb4bitLinear()

    def __setstate__(self, state: Any) -> None:
        """A copy: its codes lead to it, and not to the module that they were copied from, which that would keep."""
        super().__setstate__(state)
        if getattr(self.weight, "quant_state", None) is not None:
            self.packed_base.sync_state(self)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Codes come with the state that they mean something by, which bitsandbytes leaves behind."""
        # The state lies beside the codes: `weight.absmax`, `weight.quant_map`, `weight.quant_state.bitsandbytes__nf4`.
        begin = f"{prefix}weight."
        parts = {name: value for name, value in state_dict.items() if name.startswith(begin)}
        rest = {name: value for name, value in state_dict.items() if name not in parts}
        codes = rest.get(f"{prefix}weight")
        state: Any = QuantState.from_dict(parts, device=self.weight.device) if parts else None
        if codes is not None and self.packed_base.is_packed(self):
            if state is None:
                missing_keys.append(f"{begin}absmax")
                # Codes without their state mean nothing: nothing is loaded, and what is missing is said.
                del rest[f"{prefix}weight"]
            elif tuple(state.shape) != (self.out_features, self.in_features):
                error_msgs.append(f"'{prefix}weight' is quantized from {tuple(state.shape)}, not from its shape here")
            elif codes.shape == self.weight.shape:
                self.weight.quant_state = state  # pyright: ignore[reportAttributeAccessIssue]
                self.quant_state = state
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


class Linear8bit(Packed, Stored8bit):
    """int8 with a scale a row: what bitsandbytes stores, the product with the expanded weight.

    The inputs are not quantized, unlike in bitsandbytes' own product.
    """

    packed_base = Bnb8bitLinear()


def claim(module: Any, dtype: torch.dtype) -> None:
    """Re-class one of bitsandbytes' modules in place, on the same storage.

    Args:
        dtype: what the model computes in, for int8, which doesn't store it.

    Raises:
        DamagedBaseError: what is stored doesn't fit together.
    """
    if isinstance(module, Packed) or not isinstance(module, Stored4bit | Stored8bit):
        return
    if isinstance(module, Stored4bit):
        state = getattr(module.weight, "quant_state", None)
        # One evaluation by bitsandbytes on such a CPU was enough for it.
        if getattr(state, "packing_format_for_cpu", False):
            _unpack_cpu_format(module.weight, state)
        if Linear4bit.packed_base.is_packed(module) or not module.weight.is_floating_point():
            check_4bit(module, state_of(module))
        module.__class__ = Linear4bit
    else:
        if Linear8bit.packed_base.is_packed(module):
            check_8bit(module, scales_of(module))
        # int8 doesn't store what the weight was before; here the model is known.
        module.compute_dtype = dtype  # type: ignore[assignment]
        module.__class__ = Linear8bit


def _unpack_cpu_format(weight: Any, state: Any) -> None:
    """Undo the repacking that bitsandbytes does on CPUs; the block maxima stay rounded to bfloat16."""
    absmax = state.absmax.T.reshape(-1).float()
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    if not state.nested:
        # The inverse of bitsandbytes leaves them transposed.
        weight.quant_state.absmax = absmax


def check_4bit(module: Any, state: Any) -> None:
    """Codes, scales and tables of a 4-bit module in the numbers that its shape asks for. Raises: DamagedBaseError."""
    shape = (module.out_features, module.in_features)
    if state is None:
        raise DamagedBaseError("it has no state (quant_state)")
    if tuple(state.shape or ()) != shape:
        raise DamagedBaseError(f"it was quantized from {state.shape}, not from {shape}")
    count, size = math.prod(shape), module.weight.element_size()
    blocks = _blocks(count, state.blocksize)
    # Two codes a byte, in whole elements of the storage's dtype.
    _expect("codes in bytes", module.weight.numel() * size, -(-((count + 1) // 2) // size) * size)
    _expect("scales (absmax)", state.absmax.numel(), blocks)
    _expect("entries of the table (quant_map)", state.code.numel(), 16)
    if state.nested:
        inner = state.state2
        _expect("scales of scales (nested_absmax)", inner.absmax.numel(), _blocks(blocks, inner.blocksize))
        _expect("entries of the table of scales (nested_quant_map)", inner.code.numel(), 256)


def check_8bit(module: Any, scales: Any) -> None:
    """Codes and scales of an int8 module in the numbers that its shape asks for. Raises: DamagedBaseError."""
    shape = (module.out_features, module.in_features)
    if tuple(module.weight.shape) != shape:
        raise DamagedBaseError(f"its codes are {tuple(module.weight.shape)}, not {shape}")
    if scales is None:
        raise DamagedBaseError("it has no scales (SCB)")
    _expect("scales (SCB)", scales.numel(), module.out_features)


def _blocks(count: int, size: Any) -> int:
    if not isinstance(size, int) or size < 1:
        raise DamagedBaseError(f"its block size is {size!r}")
    return -(-count // size)


def _expect(what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise DamagedBaseError(f"it has {found:,} {what}, not {wanted:,}")


def state_of(module: Any) -> Any:
    """The quantization state of a 4-bit module, or None where its weight isn't quantized."""
    own = getattr(module.weight, "quant_state", None)
    # FSDP makes plain parameters of the weights; the module keeps the state.
    return own if own is not None or module.weight.dtype != module.quant_storage else module.quant_state


def scales_of(module: Any) -> Tensor:
    """The scale of each row of an int8 module."""
    own = getattr(module.weight, "SCB", None)
    return module.state.SCB if own is None else own


_LARGEST_FAST_BLOCK = 1024
"""Beyond it bitsandbytes' kernel for the CPU is inexact where it uses AVX512."""


def block_maxima(state: Any) -> Tensor:
    """The largest magnitude that each block of 4-bit codes reaches, in float32."""
    if not state.nested:
        return state.absmax.float()
    # Double quantization: 8-bit scales in blocks of 256, around their mean.
    return dequantize_blockwise(state.absmax, state.state2).float().add_(state.offset)


@torch.no_grad()
def expand_4bit(packed: Tensor, state: Any) -> Tensor:
    """The weight in the shape and dtype that it had before it was quantized, equal to bitsandbytes' bit for bit."""
    codes, absmax = packed.data, block_maxima(state)
    shape, size, dtype = tuple(state.shape), state.blocksize, state.dtype
    if codes.device.type != "cpu":
        return _kernel(codes, absmax, state, shape)
    # The kernel for the CPU takes each row to begin a block; as (blocks, block) that is true of any shape.
    count = math.prod(shape)
    whole = count // size if size <= _LARGEST_FAST_BLOCK else 0
    codes = codes.reshape(-1).view(torch.uint8)
    if whole * size == count:
        return _kernel(codes, absmax, state, (whole, size)).view(shape)
    head = _kernel(codes[: whole * size // 2], absmax[:whole], state, (whole, size)).view(-1) if whole else None
    # The last block of a weight whose size no block divides, by a table in float32, rounded once as the kernel does.
    tail = _looked_up(codes[whole * size // 2 :], absmax[whole:], state.code, size)[: count - whole * size].to(dtype)
    return (tail if head is None else torch.cat([head, tail])).view(shape)


def _kernel(codes: Tensor, absmax: Tensor, state: Any, shape: Sequence[int]) -> Tensor:
    return torch.ops.bitsandbytes.dequantize_4bit(
        codes, absmax, state.blocksize, state.quant_type, list(shape), state.dtype
    )


def _looked_up(codes: Tensor, absmax: Tensor, codebook: Tensor, size: int) -> Tensor:
    """codebook[code] * absmax of its block, in float32; the high half of a byte comes first."""
    pairs = torch.stack([codes >> 4, codes & 0xF], dim=1).reshape(-1).int()
    return codebook.float()[pairs] * absmax.repeat_interleave(size)[: pairs.numel()]


@torch.no_grad()
def expand_8bit(codes_OI: Tensor, scales_O: Tensor, dtype: torch.dtype) -> Tensor:
    """w = code * scale / 127 by rows, in bitsandbytes' order of rounding in float32."""
    # (code * scale) / 127 and not code * (scale / 127): their last bits differ.
    return torch.mul(codes_OI.data, scales_O[:, None]).mul_(1 / 127).to(dtype)


PIECE = 1 << 17
"""How many weights are quantized at once on a CPU: what that takes stays in its cache. A multiple of all blocks."""
_LEAST = 1e-38
"""What the magnitude of a block of zeros is taken for, in bitsandbytes."""
_NESTED_BLOCK = 256
"""How many scales share a scale in double quantization, in bitsandbytes."""


def packed_4bit(
    weight_OI: Tensor, blocksize: int, kind: str, double: bool, storage: torch.dtype, module: Any = None
) -> Params4bit:
    """What bitsandbytes' `quantize_4bit` gives for any shape; the state is noted in the module as well."""
    # On a CPU whole, a weight takes ten times its size while it is quantized, in several float32 and int32 tensors.
    pieces = weight_OI.reshape(-1).split(PIECE if weight_OI.device.type == "cpu" else weight_OI.numel())
    packed, maxima = zip(*(_packed_piece(piece, blocksize, kind, storage) for piece in pieces), strict=True)
    absmax, nested = torch.cat(maxima), {}
    if double:
        # The mean of all block maxima, and so after the last piece.
        offset = absmax.mean()
        absmax, state2 = quantize_blockwise(absmax - offset, blocksize=_NESTED_BLOCK)
        nested = {"offset": offset, "state2": state2}
    state = QuantState(
        absmax, weight_OI.shape, get_4bit_type(kind, weight_OI.device), blocksize, kind, weight_OI.dtype, **nested
    )
    if module is not None:
        module.quant_state = state
    parameter: Any = Params4bit
    return parameter(torch.cat(packed), False, state, blocksize, double, kind, storage, module, bnb_quantized=True)


def _packed_piece(piece: Tensor, blocksize: int, kind: str, storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """The codes of some weights, two a byte, and the largest magnitude of each block."""
    if piece.device.type == "cpu" and piece.numel() % blocksize == 0:
        # bitsandbytes looks each weight up by bisection there; to count the midpoints below it takes half of the time.
        blocks = piece.to(torch.float32, copy=True).view(-1, blocksize)
        absmax = torch.maximum(blocks.amax(-1), -blocks.amin(-1)).abs()
        if absmax.isfinite().all():
            # In bitsandbytes' order of rounding: times the reciprocal, not divided by the maximum.
            scaled = blocks.mul_((1.0 / absmax.clamp(min=_LEAST)).unsqueeze(-1)).clamp_(-1, 1).view(-1)
            codes = _nearest(scaled, get_4bit_type(kind, piece.device))
            return ((codes[::2] << 4) | codes[1::2]).view(storage).unsqueeze(1), absmax
    # What is left: GPUs, an incomplete last block, and infinities, whose codes are then bitsandbytes' own.
    return torch.ops.bitsandbytes.quantize_4bit.default(piece, blocksize, kind, storage)


def _nearest(scaled: Tensor, codebook: Tensor) -> Tensor:
    """The code of the nearest value for each number; the lower value where two are as near."""
    order = codebook.argsort()
    midpoints = (codebook[order[:-1]] + codebook[order[1:]]) / 2
    # Up to the code of a value from that of the one below, which in FP4 may be larger: bytes count round.
    steps = order.diff() % 256
    # Each midpoint below a number moves its code up by one place: 15 passes of bytes, which a CPU does many at a time.
    codes = torch.full(scaled.shape, int(order[0]), dtype=torch.uint8)
    above = torch.empty(scaled.shape, dtype=torch.bool)
    for midpoint, step in zip(midpoints.tolist(), steps.tolist(), strict=True):
        codes.add_(torch.gt(scaled, midpoint, out=above).view(torch.uint8), alpha=step)
    return codes


def packed_8bit(weight_OI: Tensor) -> Int8Params:
    """What bitsandbytes' `Int8Params` makes of a weight: codes by way of float16, and a scale a row."""
    # Whole rows: an int8 scale is that of a row.
    rows = max(1, PIECE // weight_OI.shape[1]) if weight_OI.device.type == "cpu" else weight_OI.shape[0]
    pieces = [int8_vectorwise_quant(piece.contiguous().half())[:2] for piece in weight_OI.split(rows)]
    codes, scales = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    parameter: Any = Int8Params
    return parameter(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)


BASES: tuple[Base, ...] = (Bnb4bitLinear(), Bnb8bitLinear())
