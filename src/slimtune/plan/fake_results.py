"""What operations on tensors without data give, remembered by the shapes and types of their arguments.

torch's fake tensors have such a memory as well, but it looks at all properties that an argument can have, symbolic and
sparse ones included, which takes most of the time of a simulated step. Here are those that a step's own tensors have,
and whatever has others is left to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_PLAIN = frozenset(
    {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
)  # fmt: skip
_UNKNOWN = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}
"""Marks of operations whose results' shapes don't follow from shapes, or which change their argument's."""


@dataclass(frozen=True)
class _Made:
    """A tensor that an operation makes."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


Outputs = tuple[Any, ...]
"""Of each result a `_Made`, the number of the argument that it is, or None."""

_remembered: dict[Any, tuple[bool, Outputs]] = {}
"""By operation and arguments: whether the result is a tuple, and what is in it. Shapes alone, no tensors."""


def result_of(fake: FakeTensorMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` gives for fake tensors of this mode; raises what it raises."""
    kind = _kind(func)
    if kind == "other":
        return func(*args, **kwargs)
    key: list[Any] = [func, torch.get_default_dtype()]
    tensors: list[FakeTensor] = []
    if not (_describe(args, key, tensors) and _describe(kwargs.items(), key, tensors) and tensors):
        return func(*args, **kwargs)
    if kind == "view":
        return _viewed(fake, tensors[0].fake_device, func, args, kwargs)
    whole = tuple(key)
    known = _remembered.get(whole)
    if known is None:
        result = func(*args, **kwargs)
        outputs = _outputs(result, tensors)
        if outputs is not None:
            _remembered[whole] = isinstance(result, tuple), outputs
        return result
    is_tuple, outputs = known
    made = tuple(_make(fake, output) if isinstance(output, _Made) else _argument(tensors, output) for output in outputs)
    return made if is_tuple else made[0]


@cache
def _kind(func: Any) -> str:
    """ "view" of one tensor, "plain" where the results follow from shapes, "other" for torch to tell."""
    if func.namespace not in ("aten", "prims") or _UNKNOWN & set(func.tags) or "lift" in func.name():
        return "other"
    return "view" if func.is_view else "plain"


def _describe(values: Iterable[Any], key: list[Any], tensors: list[FakeTensor]) -> bool:
    """Append what results depend on; whether all of it is known."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None or value.layout is not torch.strided or value.is_complex():
                return False
            key += (value.shape, value.stride(), value.dtype, value.fake_device)
            tensors.append(value)
        elif kind in _PLAIN:
            # With the type: 1, 1.0 and True are equal, and give results of other types.
            key += (kind, value)
        elif kind is list or kind is tuple:
            key += (kind, len(value))
            if not _describe(value, key, tensors):
                return False
        else:
            return False
    return True


def _viewed(fake: FakeTensorMode, device: torch.device, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A view by the kernel itself, which shares the storage and takes no longer than to look one up."""
    with in_kernel_invocation_manager(fake):
        result = func(*args, **kwargs)
    if isinstance(result, Tensor):
        return FakeTensor(fake, result, device)
    return type(result)(FakeTensor(fake, each, device) for each in result)


def _outputs(result: Any, tensors: list[FakeTensor]) -> Outputs | None:
    """How to make such a result again; None where it isn't known how."""
    storages = {tensor.untyped_storage()._cdata for tensor in tensors}
    outputs: list[Any] = []
    for each in result if isinstance(result, tuple) else (result,):
        same = [number for number, tensor in enumerate(tensors) if tensor is each]
        if each is None or same:
            outputs.append(same[0] if same else None)
        elif type(each) is FakeTensor and each.constant is None and _is_whole(each, storages):
            outputs.append(_Made(each.shape, each.stride(), each.dtype, each.fake_device))
        else:
            return None
    return tuple(outputs)


def _is_whole(made: FakeTensor, storages: set[int]) -> bool:
    """Whether a tensor is all of a storage of its own."""
    storage = made.untyped_storage()
    reach = 1 + sum((size - 1) * step for size, step in zip(made.shape, made.stride(), strict=True))
    own = storage._cdata not in storages and made.layout is torch.strided and not made.is_complex()
    return own and storage.nbytes() == (reach * made.itemsize if made.numel() else 0)


def _make(fake: FakeTensorMode, output: _Made) -> FakeTensor:
    with in_kernel_invocation_manager(fake):
        empty = torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device="meta")
    return FakeTensor(fake, empty, output.device)


def _argument(tensors: list[FakeTensor], number: int | None) -> FakeTensor | None:
    return None if number is None else tensors[number]
