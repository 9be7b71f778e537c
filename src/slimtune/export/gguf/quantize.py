"""Numbers in the types of GGUF: floats, and blocks of 32 codes with a scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimtune.errors import ConfigError, check_choice

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
"""The types that are written here; the K-quants come from llama.cpp's own program."""

BLOCK = 32
"""Numbers that share a scale."""

_ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2}
_BLOCK_BYTES = {"Q8_0": 2 + BLOCK, "Q4_0": 2 + BLOCK // 2}


@dataclass(frozen=True)
class Blocks:
    """A matrix that is quantized already, as the bytes that GGUF stores.

    Attributes:
        data: the bytes of each row, uint8 (out, bytes).
        kind: Q8_0 or Q4_0.
    """

    data: np.ndarray[Any, Any]
    kind: str

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), in numbers."""
        return self.data.shape[0], self.data.shape[1] // _BLOCK_BYTES[self.kind] * BLOCK


def q8_0_blocks(codes_OI: Tensor, scales_OG: Tensor) -> Blocks:
    """w = scale * code, with signed codes of 8 bits and a scale for each 32 of a row. Raises: ConfigError."""
    codes, scales = _grouped(codes_OI, scales_OG, -128, 127)
    parts = [scales.view(np.uint8), codes.astype(np.int8).view(np.uint8)]
    return Blocks(np.concatenate(parts, axis=-1).reshape(len(codes), -1), "Q8_0")


def q4_0_blocks(codes_OI: Tensor, scales_OG: Tensor) -> Blocks:
    """w = scale * code, with signed codes in [-8, 7] and a scale for each 32 of a row. Raises: ConfigError."""
    codes, scales = _grouped(codes_OI, scales_OG, -8, 7)
    # Stored with an offset of 8: -8 is 0, and a scale of either sign uses all 16 codes.
    nibbles = (codes + 8).astype(np.uint8)
    # A byte holds a number of the block's first half in its low bits and one of the second half in its high bits.
    packed = nibbles[..., : BLOCK // 2] | (nibbles[..., BLOCK // 2 :] << 4)
    return Blocks(np.concatenate([scales.view(np.uint8), packed], axis=-1).reshape(len(codes), -1), "Q4_0")


def _grouped(
    codes_OI: Tensor, scales_OG: Tensor, least: int, most: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Codes (out, groups, 32) and float16 scales (out, groups, 1)."""
    out, features = codes_OI.shape
    if features % BLOCK or tuple(scales_OG.shape) != (out, features // BLOCK):
        raise ConfigError(
            f"GGUF has one scale for each {BLOCK} numbers of a row: codes {tuple(codes_OI.shape)} need scales "
            f"{(out, features // BLOCK)}, found {tuple(scales_OG.shape)}"
        )
    if codes_OI.min() < least or codes_OI.max() > most:
        raise ConfigError(f"codes must be in [{least}, {most}], found {int(codes_OI.min())} to {int(codes_OI.max())}")
    codes = codes_OI.cpu().to(torch.int16).numpy().reshape(out, -1, BLOCK)
    scales = scales_OG.detach().cpu().to(torch.float16)
    if not torch.isfinite(scales).all():
        raise ConfigError("GGUF stores scales as float16, and one of these is beyond its range")
    return codes, scales.numpy().reshape(out, -1, 1)


def kind_of(name: str, shape: Sequence[int], wanted: str) -> str:
    """The type in which a tensor of the file is stored.

    Vectors, positions and routers are small and read often: F32. A matrix whose rows have no whole blocks is F16.
    With Q4_0, embeddings and head are Q8_0: their rounding costs more than that of all the others.
    """
    check_choice("the type of a GGUF file", wanted, KINDS)
    if len(shape) < 2 or "norm" in name or "ffn_gate_inp" in name or name.startswith(("position_embd", "token_types")):
        return "F32"
    if wanted in _BLOCK_BYTES and shape[-1] % BLOCK:
        return "F16"
    if wanted == "Q4_0" and name.startswith(("token_embd", "output.")):
        return "Q8_0"
    return wanted


def byte_shape(shape: Sequence[int], kind: str) -> tuple[int, ...]:
    """The shape of the bytes that a tensor takes."""
    *rows, last = shape
    row = last * _ITEM_SIZE[kind] if kind in _ITEM_SIZE else last // BLOCK * _BLOCK_BYTES[kind]
    return (*rows, row)


def encoded(name: str, tensor: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """A tensor as the bytes of a type. Raises: ConfigError, for numbers that the type can't hold."""
    import gguf

    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    if not np.isfinite(values).all():
        raise ConfigError(f"'{name}' has numbers that are infinite or not a number; the model is damaged")
    if kind in ("F16", *_BLOCK_BYTES) and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise ConfigError(f"'{name}' has numbers beyond float16's range, which {kind} can't hold; write BF16 or F32")
    if kind == "F32":
        return values.view(np.uint8)
    if kind == "F16":
        return values.astype(np.float16).view(np.uint8)
    return gguf.quantize(values, gguf.GGMLQuantizationType[kind])


def decoded(data: np.ndarray[Any, Any], kind: str) -> Tensor:
    """The float32 numbers that the bytes of a type stand for."""
    import gguf

    return torch.from_numpy(np.array(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]), dtype=np.float32))
