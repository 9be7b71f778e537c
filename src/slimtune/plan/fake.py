"""Tensors without data that run through the code of real ones.

Numbers are fake; token ids, labels and masks are real, so that code which looks at them takes its usual way. Where a
number is read all the same the answer is one, and yes: a check passes, a bound is kept.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)

from slimtune.errors import PlanError
from slimtune.plan.memory_tracker import MemoryTracker, tensors_in

LARGEST_REAL = 2**20
"""Elements of the largest integers and flags that are kept real."""

_aten = torch.ops.aten


class FakeMemoryTracker(MemoryTracker):
    """Counts what operations on fake tensors would allocate; enter it inside of its `fake` mode."""

    def __init__(self, rounded: Callable[[int], int] | None = None, fake: FakeTensorMode | None = None) -> None:
        super().__init__(rounded)
        self.fake = fake or FakeTensorMode(allow_non_fake_inputs=True)

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        has_fake = any(isinstance(tensor, FakeTensor) for tensor in tensors_in((args, tuple(kwargs.values()))))
        if not has_fake and func in (_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default):
            return _really(func, args, kwargs)
        if func is _aten.index.Tensor:
            args = (args[0], _by_position(args[1]))
        try:
            result = func(*args, **kwargs)
        except DataDependentOutputException:
            return _answer(func, args)
        except DynamicOutputShapeException as error:
            raise PlanError(
                f"the model chooses how much it computes by what it has computed ({func}), which can't be planned "
                "without running it"
            ) from error
        return result if has_fake or not _stays_real(result) else _really(func, args, kwargs)


@contextlib.contextmanager
def taken_for_real() -> Iterator[None]:
    """Let libraries treat fake tensors as they treat real ones.

    transformers leaves out short cuts of its masks for them, and torch can't move a module that has them.
    """
    patches: list[tuple[Any, str, Any]] = [
        (transformers.utils.import_utils, "is_fake_tensor", lambda tensor: False),
        (torch.utils, "swap_tensors", _overwrite),
    ]
    before = [getattr(owner, name) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(patches, before, strict=True):
            setattr(owner, name, value)


def _overwrite(target: Any, source: Any) -> None:
    """Make one fake tensor what another one is."""
    requires_grad = target.requires_grad
    target.data = source.detach()
    target.fake_device = source.fake_device
    target.requires_grad_(requires_grad)


def _by_position(indices: list[Any]) -> list[Any]:
    """Indices with real masks as the positions that they leave, which tell how many there are."""
    found: list[Any] = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        found += _really(_aten.nonzero.default, (index,), {}).unbind(1) if is_mask else [index]
    return found


def _stays_real(result: Any) -> bool:
    found = list(tensors_in((result,)))
    return bool(found) and all(not t.is_floating_point() and t.numel() <= LARGEST_REAL for t in found)


def _really(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _answer(func: Any, args: tuple[Any, ...]) -> Any:
    if func is _aten.equal.default:
        return False
    value: Tensor = args[0]
    return {torch.bool: True}.get(
        value.dtype, math.nan if value.is_complex() else 1.0 if value.is_floating_point() else 1
    )
