"""A tensor that is computed only if something looks at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Lazy:
    """What stands for a tensor; each use that a subclass doesn't know makes it the real one."""

    _real: Tensor | None = None

    def computed(self) -> Tensor:
        raise NotImplementedError

    def tensor(self) -> Tensor:
        """The real tensor."""
        if self._real is None:
            self._real = self.computed()
        return self._real

    def __getattr__(self, name: str) -> Any:
        # Copying and pickling ask for such names to see what an object can do, and must not make the tensor real.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Any:
        return self.tensor()[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return func(*(real(arg) for arg in args), **{key: real(value) for key, value in (kwargs or {}).items()})


def real(value: Any) -> Any:
    """The value, with real tensors where there were lazy ones."""
    if type(value) in (list, tuple):
        return type(value)(real(part) for part in value)
    return value.tensor() if isinstance(value, Lazy) else value


def _operator(name: str) -> Callable[..., Any]:
    # Python looks operators up on the class, past `__getattr__`, so that each has to be there by name.
    def apply(self: Lazy, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*(real(arg) for arg in args))

    return apply


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "rmatmul", "pow", "neg",
              "lt", "le", "gt", "ge", "len", "iter", "abs"):  # fmt: skip
    setattr(Lazy, f"__{_name}__", _operator(f"__{_name}__"))
