"""What weights stored as integers have in common: codes and a scale for each group of inputs, w = code * scale.

In a state dict, and so on disk, such a module has the tensors of compressed-tensors' "pack-quantized" format, which
vLLM, SGLang and transformers read: `weight_packed` (codes, several an int32), `weight_scale` (out, groups) and
`weight_shape` (out, in).
"""

from __future__ import annotations

import functools
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from slimtune.bases.packed import Packed, PackedLinear
from slimtune.core.delta import Base, Dense
from slimtune.errors import DamagedBaseError
from slimtune.ops import grid

PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
"""The tensors of one weight in a file."""


class IntegerLinear(PackedLinear):
    """`y = x W^T + b` with W (out, in) as codes and a scale (out, groups) for each group of inputs."""

    bits: ClassVar[int]

    @abstractmethod
    def expand(self, module: Any, codes: Tensor, scales_OG: Tensor, dtype: torch.dtype) -> Tensor:
        """code * scale, (out, in), of codes as the module may hold them."""

    @abstractmethod
    def pack(self, codes_OI: Tensor) -> Tensor:
        """int8 codes as they stand in a file."""

    @abstractmethod
    def unpack(self, packed: Tensor, inputs: int) -> Tensor:
        """The inverse of `pack`."""

    @abstractmethod
    def hold_codes(self, codes_OI: Tensor) -> Tensor:
        """int8 codes as a module keeps them at first."""

    @abstractmethod
    def codes(self, module: Any) -> Tensor:
        """The codes of a module, int8 (out, in)."""

    def stored_as(self, module: Any) -> str:
        return f"int{self.bits}" if self.is_packed(module) else super().stored_as(module)

    def dtype(self, module: Any) -> torch.dtype:
        return module.compute_dtype

    def expansion(self, module: Any) -> Callable[[], Tensor]:
        # Bound to the tensors and not to the module, whose own may have been exchanged by the time of the backward.
        return functools.partial(self.expand, module, module.weight.data, module.weight_scale, module.compute_dtype)

    def group_size(self, module: Any) -> int:
        """How many inputs share a scale."""
        return module.in_features // module.weight_scale.shape[1]

    def quantize(self, module: Any, weight_OI: Tensor) -> Dense:
        scales_OG = grid.searched_scales(weight_OI, self.group_size(module), self.bits)
        codes = self.hold_codes(grid.nearest_codes(weight_OI, scales_OG, self.bits))
        return {"weight": nn.Parameter(codes, requires_grad=False), "weight_scale": scales_OG}

    def beyond(self, module: Any, weight_OI: Tensor) -> int:
        scales_OG = module.weight_scale.float().repeat_interleave(self.group_size(module), dim=1)
        lowest, highest = grid.code_range(self.bits)
        codes = weight_OI.float() / torch.where(scales_OG == 0, torch.inf, scales_OG)
        return int(((codes < lowest - 0.5) | (codes > highest + 0.5)).sum())

    def make_plain(self, module: Any, weight_OI: Tensor) -> None:
        module.drop_codes()
        super().make_plain(module, weight_OI)


class HoldsCodes(Packed):
    """Mixed in front of the layer whose weight is held as codes.

    Attributes:
        compute_dtype: what the weight is expanded to.
        weight_scale: (out, groups).
    """

    packed_base: IntegerLinear  # pyright: ignore[reportIncompatibleVariableOverride]
    compute_dtype: torch.dtype
    weight_scale: Tensor

    @classmethod
    def take(cls, module: Any, codes_OI: Tensor, scales_OG: Tensor) -> None:
        """Re-class a plain layer in place: it computes in the dtype that it had, from these codes and scales."""
        dtype = module.weight.dtype
        module.__class__ = cls
        module.put_codes(codes_OI, scales_OG, dtype)

    def put_codes(self, codes_OI: Tensor, scales_OG: Tensor, dtype: torch.dtype) -> None:
        """Hold these in place of the weight, int8 (out, in) and (out, groups)."""
        module: Any = self
        module._parameters["weight"] = nn.Parameter(self.packed_base.hold_codes(codes_OI), requires_grad=False)
        module.compute_dtype = dtype
        # They are no statistics that a module trained whole would copy, and are stored by the codes' own names.
        module.register_buffer("weight_scale", scales_OG, persistent=False)

    @torch.no_grad()
    def _replace_codes(self, codes_OI: Tensor, scales_OG: Any) -> None:
        module: Any = self
        held = self.packed_base.hold_codes(codes_OI)
        if (held.dtype, held.shape) == (module.weight.dtype, module.weight.shape):
            # In place, so that a tie to another module holds; no cached form of the old codes may outlive them.
            module.weight.data.copy_(held)
            self.weight_scale.copy_(scales_OG)
            _STORED.pop(module.weight, None)
        else:
            self.put_codes(codes_OI, scales_OG, self.compute_dtype)
        module._buffers.pop("kernel_scale", None)

    def drop_codes(self) -> None:
        """Forget all that is known beside a plain weight."""
        module: Any = self
        for name in ("weight_scale", "kernel_scale"):
            module._buffers.pop(name, None)
            module._non_persistent_buffers_set.discard(name)
        module.__dict__.pop("compute_dtype", None)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Rows and columns of the weight as it is stored: an embedding has a row for each id."""
        module: Any = self
        inputs, outputs = self.packed_base.features(module)
        return (inputs, outputs) if self.packed_base.is_transposed else (outputs, inputs)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        module: Any = self
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        base = self.packed_base
        if base.is_packed(module):
            del destination[f"{prefix}weight"]
            packed, shape = _stored(module)
            destination |= {
                f"{prefix}{PACKED}": packed,
                f"{prefix}{SCALE}": self.weight_scale,
                f"{prefix}{SHAPE}": shape,
            }

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        module: Any = self
        base, rest = self.packed_base, dict(state_dict)
        names = [f"{prefix}{name}" for name in (PACKED, SCALE, SHAPE)]
        stored = [rest.pop(name, None) for name in names]
        if base.is_packed(module) and any(part is not None for part in stored):
            absent = [name for name, part in zip(names, stored, strict=True) if part is None]
            missing_keys += absent
            if not absent:
                try:
                    codes_OI = unpacked(base, *stored, shape=self.stored_shape)
                    self._replace_codes(codes_OI, stored[1])
                except DamagedBaseError as error:
                    error_msgs.append(f"'{prefix}weight': {error}")
            absent_before = len(missing_keys)
            super()._load_from_state_dict(  # type: ignore[misc]
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            # The weight is there by its other names.
            missing_keys[absent_before:] = [k for k in missing_keys[absent_before:] if k != f"{prefix}weight"]
            return
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


_STORED: Any = WeakIdKeyDictionary()
"""By weight, what a state dict has of it for as long as that is there."""


def _stored(module: Any) -> tuple[Tensor, Tensor]:
    """Codes and shape as a file has them; of one weight in two modules the same tensors, so that it is stored once."""
    known = [reference() for reference in _STORED.get(module.weight, ())]
    if known and all(tensor is not None for tensor in known):
        return known[0], known[1]  # type: ignore[return-value]
    base = module.packed_base
    packed, shape = base.pack(base.codes(module)), torch.tensor(module.stored_shape)
    _STORED[module.weight] = (weakref.ref(packed), weakref.ref(shape))
    return packed, shape


def unpacked(base: IntegerLinear, packed: Any, scales_OG: Any, stored_shape: Any, shape: tuple[int, int]) -> Tensor:
    """int8 codes (out, in) of the tensors in a file. Raises: DamagedBaseError, where they don't fit together."""
    outputs, inputs = shape
    if tuple(stored_shape.tolist()) != shape:
        raise DamagedBaseError(f"it was quantized from {tuple(stored_shape.tolist())}, not from {shape}")
    words = -(-inputs * base.bits // 32)
    if packed.dtype != torch.int32 or tuple(packed.shape) != (outputs, words):
        raise DamagedBaseError(
            f"its codes are {tuple(packed.shape)} in {packed.dtype}, not {(outputs, words)} in torch.int32"
        )
    if scales_OG.dim() != 2 or scales_OG.shape[0] != outputs or not scales_OG.shape[1] or inputs % scales_OG.shape[1]:
        raise DamagedBaseError(f"its scales are {tuple(scales_OG.shape)}, which {shape} can't have")
    if not torch.isfinite(scales_OG).all():
        raise DamagedBaseError("a scale is not finite")
    return base.unpack(packed, inputs)


BASES: tuple[Base, ...] = ()
