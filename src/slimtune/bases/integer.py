"""What weights stored as integers have in common: codes and a scale for each group of inputs.

    w = code * scale,  or (code - zero) * scale on an asymmetric grid

In a state dict, and so on disk, such a module has the tensors of a format of compressed-tensors, which vLLM, SGLang and
transformers read. "pack-quantized": `weight_packed` (codes, several an int32), `weight_scale` (out, groups),
`weight_shape` (out, in) and, asymmetric, `weight_zero_point`. "int-quantized": `weight` (codes, int8) and
`weight_scale`.
"""

from __future__ import annotations

import functools
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from slimtune.bases.packed import Packed, PackedLinear
from slimtune.core.frozen import Base, Dense
from slimtune.errors import DamagedBaseError
from slimtune.ops import grid
from slimtune.ops.autograd import Product, reads_codes
from slimtune.ops.grid import GridWeight
from slimtune.storage.compressed import CODES, PACKED, SCALE, SHAPE, ZERO


class IntegerLinear(PackedLinear):
    """`y = x W^T + b` with W (out, in) as codes and a scale (out, groups) for each group of inputs."""

    bits: ClassVar[int]
    format: ClassVar[str] = "pack-quantized"
    """Of compressed-tensors, in which it is stored."""
    parts: ClassVar[tuple[str, ...]] = (PACKED, SCALE, SHAPE)
    """The tensors of a file that it always has."""
    most_tokens: ClassVar[int] = 0
    """Up to so many the kernel that reads codes is quicker than expanding them."""
    rounds_inputs: ClassVar[bool] = False
    """Whether the product is one with inputs that are rounded to 8 bits."""

    @abstractmethod
    def expand(
        self, module: Any, codes: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """The weight (out, in), of codes as the module may hold them."""

    @abstractmethod
    def hold_codes(self, codes_OI: Tensor) -> Tensor:
        """int8 codes as a module keeps them at first."""

    @abstractmethod
    def codes(self, module: Any) -> Tensor:
        """The codes of a module, int8 (out, in)."""

    @abstractmethod
    def kernel(self, module: Any, dtype: torch.dtype) -> Product | None:
        """The product with few tokens that reads the codes of a packed module; None where no kernel takes them.

        The module may hold its codes in the kernel's order from here on.
        """

    def for_few_tokens(self, module: Any, x: Tensor) -> Product | None:
        dtype = self.product_dtype(module, x)
        if not reads_codes(x, dtype, self.most_tokens):
            return None
        # A token that is decoded comes here once a layer: what doesn't change from one to the next is kept.
        found: _Kernel | None = module.__dict__.get(_KERNEL)
        if found is None or not found.is_of(module, dtype):
            product = self.kernel(module, dtype) if self.is_packed(module) else None
            found = module.__dict__[_KERNEL] = _Kernel(module.weight, module._buffers.get(SCALE), dtype, product)
        return found.product

    def stored_as(self, module: Any) -> str:
        return f"int{self.bits}" if self.is_packed(module) else super().stored_as(module)

    def dtype(self, module: Any) -> torch.dtype:
        return module.compute_dtype

    def expansion(self, module: Any) -> Callable[[], Tensor]:
        # Bound to the tensors and not to the module, whose own may have been exchanged by the time of the backward.
        held = (module.weight.data, module.weight_scale, module._buffers.get(ZERO), module.compute_dtype)
        return functools.partial(self.expand, module, *held)

    def grid_of(self, module: Any) -> tuple[int, int] | None:
        has_zeros = ZERO in module._buffers
        return (self.bits, self.group_size(module)) if self.is_packed(module) and not has_zeros else None

    def group_size(self, module: Any) -> int:
        """How many inputs share a scale."""
        return module.in_features // module.weight_scale.shape[1]

    def quantize(self, module: Any, weight_OI: Tensor) -> Dense:
        new = grid.rounded(weight_OI, self.group_size(module), self.bits, symmetric=ZERO not in module._buffers)
        codes = nn.Parameter(self.hold_codes(new.codes), requires_grad=False)
        return {"weight": codes, SCALE: new.scales} | ({} if new.zeros is None else {ZERO: new.zeros})

    def beyond(self, module: Any, weight_OI: Tensor) -> int:
        return grid.beyond(weight_OI, module.weight_scale, self.bits, module._buffers.get(ZERO))

    def make_plain(self, module: Any, weight_OI: Tensor) -> None:
        module.drop_codes()
        super().make_plain(module, weight_OI)


_KERNEL = "few_tokens"
"""Where a module keeps its `_Kernel`."""


@dataclass(frozen=True)
class _Kernel:
    """The product of a module with few tokens, and the weight and the scales that it was made from."""

    weight: nn.Parameter
    scales: Tensor | None
    dtype: torch.dtype
    product: Product | None

    def is_of(self, module: Any, dtype: torch.dtype) -> bool:
        """Whether they are the module's still: a merge, and what undoes it, exchange them."""
        # Its own dictionaries, as `nn.Module` finds an attribute there only after a search.
        is_same = module._parameters["weight"] is self.weight and module._buffers.get(SCALE) is self.scales
        return is_same and self.dtype == dtype


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
    def take(cls, module: Any, codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None = None) -> None:
        """Re-class a plain layer in place: it computes in the dtype that it had, from this weight."""
        dtype = module.weight.dtype
        module.__class__ = cls
        module.put_codes(codes_OI, scales_OG, zeros_OG, dtype)

    def put_codes(self, codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None, dtype: torch.dtype) -> None:
        """Hold these in place of the weight."""
        module: Any = self
        self.drop_codes()
        module._parameters["weight"] = nn.Parameter(self.packed_base.hold_codes(codes_OI), requires_grad=False)
        module.compute_dtype = dtype
        # They are no statistics that a module trained whole would copy, and are stored by the codes' own names.
        module.register_buffer(SCALE, scales_OG, persistent=False)
        if zeros_OG is not None:
            module.register_buffer(ZERO, zeros_OG, persistent=False)

    @torch.no_grad()
    def _replace_codes(self, new: GridWeight) -> None:
        module: Any = self
        held, zeros_OG = self.packed_base.hold_codes(new.codes), module._buffers.get(ZERO)
        is_alike = (held.dtype, held.shape) == (module.weight.dtype, module.weight.shape)
        if is_alike and new.scales.shape == self.weight_scale.shape and zeros_OG is None and new.zeros is None:
            # In place, so that a tie to another module holds; no cached form of the old codes may outlive them.
            module.weight.data.copy_(held)
            self.weight_scale.copy_(new.scales)
            _STORED.pop(module.weight, None)
            module.__dict__.pop(_KERNEL, None)
        else:
            self.put_codes(*new, self.compute_dtype)

    def drop_codes(self) -> None:
        """Forget all that is known beside a plain weight."""
        module: Any = self
        for name in (SCALE, ZERO):
            module._buffers.pop(name, None)
            module._non_persistent_buffers_set.discard(name)
        for name in ("compute_dtype", _KERNEL):
            module.__dict__.pop(name, None)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Rows and columns of the weight as it is stored: an embedding has a row for each id."""
        module: Any = self
        inputs, outputs = self.packed_base.features(module)
        return (inputs, outputs) if self.packed_base.is_transposed else (outputs, inputs)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        module: Any = self
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if self.packed_base.is_packed(module):
            del destination[f"{prefix}weight"]
            destination |= {f"{prefix}{part}": tensor for part, tensor in _stored(module).items()}

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        module: Any = self
        base, rest = self.packed_base, dict(state_dict)
        if not base.is_packed(module):
            super()._load_from_state_dict(  # type: ignore[misc]
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        parts = [part for part in (*base.parts, ZERO) if f"{prefix}{part}" in rest]
        stored = {part: rest.pop(f"{prefix}{part}") for part in parts}
        plain = rest.pop(f"{prefix}weight", None)
        if stored and set(base.parts) <= stored.keys():
            try:
                self._replace_codes(grid_weight(stored, base.bits, self.stored_shape))
            except DamagedBaseError as error:
                error_msgs.append(f"'{prefix}weight': {error}")
        elif stored or plain is None:
            missing_keys += [f"{prefix}{part}" for part in base.parts if part not in stored]
        if plain is not None:
            error_msgs.append(f"'{prefix}weight' is held as codes, and can't be loaded from a plain weight")
        absent_before = len(missing_keys)
        super()._load_from_state_dict(  # type: ignore[misc]
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # The weight is there by its other names.
        missing_keys[absent_before:] = [k for k in missing_keys[absent_before:] if k != f"{prefix}weight"]


_STORED: Any = WeakIdKeyDictionary()
"""By weight, what a state dict has of its codes for as long as that is there."""


def _stored(module: Any) -> dict[str, Tensor]:
    """What a file has of a weight; of one in two modules the same tensors, so that it is stored once."""
    base, zeros_OG = module.packed_base, module._buffers.get(ZERO)
    stored = {SCALE: module.weight_scale}
    if CODES in base.parts:
        return stored | {CODES: module.weight.data} | ({} if zeros_OG is None else {ZERO: zeros_OG})
    known = [reference() for reference in _STORED.get(module.weight, ())]
    if not known or any(tensor is None for tensor in known):
        known = [grid.pack(base.codes(module), base.bits), torch.tensor(module.stored_shape)]
        _STORED[module.weight] = tuple(weakref.ref(tensor) for tensor in known)
    # Zero points are packed along the outputs.
    zeros = {} if zeros_OG is None else {ZERO: grid.pack(zeros_OG.t(), base.bits).t().contiguous()}
    return stored | {PACKED: known[0], SHAPE: known[1]} | zeros  # type: ignore[dict-item]


def grid_weight(stored: Mapping[str, Any], bits: int, shape: tuple[int, int]) -> GridWeight:
    """The weight (out, in) of the tensors in a file, by their names there.

    Raises:
        DamagedBaseError: they don't fit together.
    """
    outputs, inputs = shape
    if PACKED in stored:
        was = tuple(stored[SHAPE].tolist())
        if was != shape:
            raise DamagedBaseError(f"it was quantized from {was}, not from {shape}")
        _check_tensor("codes", stored[PACKED], (outputs, -(-inputs * bits // 32)), torch.int32)
        codes_OI = grid.unpack(stored[PACKED], inputs, bits)
    else:
        codes_OI = stored[CODES]
        _check_tensor("codes", codes_OI, shape, torch.int8)
    scales_OG = stored[SCALE]
    if scales_OG.numel() == 1:
        # One for the whole weight stands as one for each row, which all that reads scales knows.
        scales_OG = scales_OG.reshape(1, 1).expand(outputs, 1).contiguous()
    if scales_OG.dim() != 2 or scales_OG.shape[0] != outputs or not scales_OG.shape[1] or inputs % scales_OG.shape[1]:
        raise DamagedBaseError(f"its scales are {tuple(scales_OG.shape)}, which {shape} can't have")
    if not torch.isfinite(scales_OG).all():
        raise DamagedBaseError("a scale is not finite")
    zeros = stored.get(ZERO)
    return GridWeight(codes_OI, scales_OG, None if zeros is None else _zeros(zeros, bits, scales_OG))


def _zeros(stored: Tensor, bits: int, scales_OG: Tensor) -> Tensor:
    """Zero points int8 (out, groups), packed along the outputs or as they are."""
    outputs, groups = scales_OG.shape
    if stored.dtype == torch.int32:
        _check_tensor("zero points", stored, (-(-outputs * bits // 32), groups), torch.int32)
        return grid.unpack(stored.t(), outputs, bits).t().contiguous()
    if stored.numel() == 1:
        stored = stored.reshape(1, 1).expand(outputs, 1)
    _check_tensor("zero points", stored, (outputs, groups), torch.int8)
    return stored.contiguous()


def _check_tensor(what: str, stored: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if stored.dtype != dtype or tuple(stored.shape) != shape:
        raise DamagedBaseError(f"its {what} are {tuple(stored.shape)} in {stored.dtype}, not {shape} in {dtype}")


BASES: tuple[Base, ...] = ()
