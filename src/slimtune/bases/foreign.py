"""Linear layers that any other library quantized, recognised by what they are and run by their own forward.

Every method is its plain formula around that forward. Where a weight is asked for, it is what the forward makes of the
rows of an identity matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.bases.packed import Packed, PackedLinear
from slimtune.core.frozen import Base, Dense, TensorSpec
from slimtune.errors import MergeError, TargetError
from slimtune.ops.reordered_linear import LinearReordered

GENERIC = True
"""Claims only what no file that knows its library has claimed."""

_WIDTHS = (("in_features", "out_features"), ("infeatures", "outfeatures"))
_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ROWS = 256
"""So many rows of the identity matrix at once."""
_ASTRAY = 0.25
"""Inputs that a layer rounds to 4 bits move the probe of its gradient by less; a gradient that is none moves it all."""


class ForeignLinear(PackedLinear):
    """`y = x W^T + b` as the module's own forward has it, W and the form that it is stored in unknown.

    Args:
        dtype: what the model computes in.
        widths: (in, out), read before adapters give the layer more names.
    """

    module_types = ()

    def __init__(self, dtype: torch.dtype, widths: tuple[int, int]) -> None:
        self._dtype, self._widths = dtype, widths

    def features(self, module: Any) -> tuple[int, int]:
        return self._widths

    def is_packed(self, module: Any) -> bool:
        return True

    def dtype(self, module: Any) -> torch.dtype:
        return self._dtype

    def spec(self, module: Any) -> TensorSpec:
        device = next((tensor.device for tensor in _own_tensors(module)), torch.device("cpu"))
        return TensorSpec(torch.Size(self.features(module)[::-1]), self._dtype, device)

    def expansion(self, module: Any) -> Callable[[], Tensor]:
        return functools.partial(self._run_over_identity, module)

    @torch.no_grad()
    def _run_over_identity(self, module: Any) -> Tensor:
        shape, dtype, device = self.spec(module)
        # A bias can be so much larger than weights that the sum of both would round them away.
        with _without_bias(module):
            # y(0) is what the forward adds whatever the input, and is taken off; y(I) - y(0) has the columns of W as
            # rows.
            call = _own_forward(module)
            offset_O = call(torch.zeros(1, shape[1], dtype=dtype, device=device))
            # Rolled to the right for each piece: never (in, in) numbers at once.
            first_RI = torch.eye(min(_ROWS, shape[1]), shape[1], dtype=dtype, device=device)
            columns = [
                call(first_RI[: shape[1] - start].roll(start, 1)) - offset_O for start in range(0, shape[1], _ROWS)
            ]
        return torch.cat(columns).t().to(dtype)

    def floating(self, module: nn.Module, name: str) -> Tensor | None:
        if name != "bias" or not (name in module._parameters or name in module._buffers):
            raise TargetError(
                f"a {type(module).__name__} keeps its {name} in a form of its library, which can't be trained; leave "
                "it out with exclude_modules, or load the base in 16 bits"
            )
        return self.bias(module)

    def dense(self, module: nn.Module) -> Dense:
        raise MergeError(
            f"a {type(module).__name__} has no place for a weight in floating point; unload the adapter, make the "
            "model plain with slimtune.dequantize(model) or load it in 16 bits, and attach and merge it there"
        )

    def make_plain(self, module: Any, weight_OI: Tensor) -> None:
        bias, training, (features_in, features_out) = self.bias(module), module.training, self.features(module)
        module.__class__ = nn.Linear
        module.__dict__.clear()
        nn.Module.__init__(module)
        module.in_features, module.out_features, module.training = features_in, features_out, training
        module.weight = nn.Parameter(weight_OI, requires_grad=False)
        module.bias = None if bias is None else nn.Parameter(bias.detach().to(weight_OI.dtype), requires_grad=False)

    def loses_gradient(self, module: Any) -> bool:
        """Whether the gradient of <e, y(x)> along d isn't |e|^2, for e = d W^T; it is that for any x and d."""
        shape, dtype, device = self.spec(module)
        # Two rows of inputs x and of directions d, the same ones on every machine.
        drawn = torch.randn(2, 2, shape[1], generator=torch.Generator().manual_seed(0)).to(device, dtype)
        x, d, call = drawn[0].requires_grad_(), drawn[1].detach(), _own_forward(module)
        try:
            # e = d W^T without the bias. For y = x W^T the gradient of <e, y> is e W, and <e W, d> = <e, d W^T> =
            # |e|^2.
            e = call(d).detach() - call(torch.zeros_like(d)).detach()
            with torch.enable_grad():
                y = call(x)
        except Exception:
            # What doesn't run on this device, or in memory that is planned, can't be tried; run, it tells itself.
            return False
        try:
            (gradient,) = torch.autograd.grad(y, x, e, allow_unused=True) if y.requires_grad else (None,)
        except (RuntimeError, NotImplementedError):
            return True
        if gradient is None:
            return True
        # By the sum over both rows: rounded inputs move it a little, a lost gradient altogether.
        along, size = (gradient.double() * d.double()).sum(), e.double().square().sum()
        return not bool((along - size).abs() <= _ASTRAY * size)


def is_foreign(module: nn.Module) -> bool:
    """Whether a module is a linear layer, by its widths, that keeps its weight in other than floating numbers."""
    if isinstance(module, (Packed, LinearReordered)) or _widths(module) is None:
        return False
    weight = getattr(module, "weight", None)
    # A block that happens to have widths, as one with several layers inside, is no layer.
    if _is_plain(weight) or any(_widths(part) for part in module.modules() if part is not module):
        return False
    # torch's own quantized layers have no tensors; what is called weight is a method.
    return callable(weight) or any(not _is_plain(tensor) for tensor in _own_tensors(module))


def claim(module: Any, dtype: torch.dtype) -> None:
    """Note on a module that it is a foreign one; nothing else of it changes."""
    widths = None if "adopted_base" in module.__dict__ else _widths(module)
    if widths is not None and is_foreign(module):
        module.adopted_base = ForeignLinear(dtype, widths)


def _widths(module: Any) -> tuple[int, int] | None:
    for names in _WIDTHS:
        features_in, features_out = (getattr(module, name, None) for name in names)
        if isinstance(features_in, int) and isinstance(features_out, int):
            return features_in, features_out
    return None


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    own = (*module._parameters.values(), *module._buffers.values())
    # A mask says nothing about how numbers are stored.
    return (tensor for tensor in own if tensor is not None and tensor.dtype != torch.bool)


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor is floating numbers in a type of torch's own, sharded and planned ones included."""
    is_torchs = type(tensor).__module__.partition(".")[0] == "torch"
    return isinstance(tensor, Tensor) and is_torchs and tensor.dtype in _NUMBERS


def _own_forward(module: Any) -> Callable[..., Tensor]:
    """The forward without any adapter."""
    adopted_from = getattr(type(module), "adopted_from", None)
    if adopted_from is None:
        return module.forward
    return module.__dict__.get("instance_forward") or functools.partial(adopted_from.forward, module)


@contextmanager
def _without_bias(module: Any) -> Iterator[None]:
    own = getattr(module, "bias", None)
    if not isinstance(own, Tensor):
        yield
        return
    module.bias = None
    try:
        yield
    finally:
        module.bias = own


BASES: tuple[Base, ...] = ()
