"""What operations on tensors without data give, by the memory and by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from slimtune.plan.fake_results import result_of

aten = torch.ops.aten
CASES: dict[str, tuple[Any, Callable[[Callable[..., Tensor]], tuple[Any, ...]], dict[str, Any]]] = {
    "product": (aten.mm.default, lambda new: (new(3, 4), new(4, 5)), {}),
    "strides": (aten.add.Tensor, lambda new: (new(4, 3).t(), new(4, 3).t()), {}),
    "broadcast": (aten.mul.Tensor, lambda new: (new(3, 1).expand(3, 4), new(4)), {}),
    "dtypes": (aten.add.Tensor, lambda new: (new(3), new(3, dtype=torch.bfloat16)), {}),
    "number": (aten.mul.Tensor, lambda new: (new(3, dtype=torch.int64), 2.0), {}),
    "flag": (aten.mul.Tensor, lambda new: (new(3, dtype=torch.int64), True), {}),
    "in place": (aten.mul_.Tensor, lambda new: (new(3, 4), new(3, 4)), {}),
    "several": (aten.native_layer_norm.default, lambda new: (new(3, 4), [4], new(4), None, 1e-5), {}),
    "view": (aten.view.default, lambda new: (new(3, 4), [4, 3]), {}),
    "view of a part": (aten.slice.Tensor, lambda new: (new(3, 4), 0, 1, 2), {}),
    "views": (aten.split.Tensor, lambda new: (new(6, 4), 2), {}),
    "new shape in place": (aten.t_.default, lambda new: (new(3, 4),), {}),
    "list": (aten.cat.default, lambda new: ([new(3, 4), new(2, 4)],), {}),
    "options": (aten._to_copy.default, lambda new: (new(3, 4),), {"dtype": torch.bfloat16}),
    "complex": (aten.view_as_real.default, lambda new: (new(3, 4, dtype=torch.complex64),), {}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_result_is_the_one_that_torch_gives(case: Any) -> None:
    func, made, kwargs = case
    fake = FakeTensorMode()
    with fake:
        first, second, expected = made(torch.empty), made(torch.empty), made(torch.empty)
        true = func(*expected, **kwargs)
        # The first fills the memory, the second comes from it.
        for args in (first, second):
            result = result_of(fake, func, args, kwargs)
            assert type(result) is type(true)
            for one, other in zip(listed(result), listed(true), strict=True):
                assert described(one, args) == described(other, expected)


def listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, list | tuple) else [result]


def described(tensor: Any, args: tuple[Any, ...]) -> Any:
    """All that a plan sees of a tensor, and which argument it is, or shares the storage of."""
    if tensor is None:
        return None
    assert isinstance(tensor, FakeTensor)
    storage = tensor.untyped_storage()
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return (
        tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device, storage.nbytes(),
        [arg is tensor for arg in tensors], [arg.untyped_storage()._cdata == storage._cdata for arg in tensors],
    )  # fmt: skip


def test_what_torch_refuses_is_refused_each_time() -> None:
    fake = FakeTensorMode()
    with fake:
        mask = torch.ones(3, dtype=torch.bool)
        for _ in range(2):
            with pytest.raises(torch._subclasses.fake_tensor.DynamicOutputShapeException):
                result_of(fake, aten.nonzero.default, (mask,), {})
