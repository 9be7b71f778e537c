"""Weights of linear layers in the order in which oneDNN multiplies by them, while a processor decodes.

A product with few tokens takes much of its time to bring the weight (out, in) into blocks, anew each time. Held in
them, a weight takes as many bytes as before and is the same number for number; at most the products sum in another
order. Which blocks they are belongs to the machine and to the version of oneDNN: none is ever written to a file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.ops.autograd import PLAIN_TENSORS, is_traced

_TOKENS = 16
"""The blocks are chosen for so many tokens; products with one or with 256 take as long in them as in their own."""
_MOST_SPREAD = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""By how much a product may differ from torch's own, of its largest number, on a machine whose blocks are taken."""


class Blocks(NamedTuple):
    """A weight in blocks, and the parameter that it belongs to: under another one they don't count."""

    parameter: nn.Parameter
    weight: Tensor


class LinearReordered(nn.Linear):
    """An `nn.Linear` whose weight is in oneDNN's blocks, and (out, in) to whoever reads it."""

    blocks: Blocks

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight (out, in), written out where it is in blocks alone."""
        own: Any = self._parameters["weight"]
        return own if own.layout == torch.strided else own.detach().to_dense()

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x (..., in) to (..., out)."""
        return product(x, self.blocks.weight, self.bias) if self._takes(x) else F.linear(x, self.weight, self.bias)

    def _takes(self, x: Tensor) -> bool:
        # Nothing is learned, cast, traced or only planned, and no adapter has its own weight here.
        return (
            self._parameters["weight"] is self.blocks.parameter
            and x.dtype == self.blocks.weight.dtype
            and type(x) is Tensor
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not is_traced()
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight.detach()


def can_reorder(module: nn.Module) -> bool:
    """Whether it is a plain `nn.Linear`, adopted or not, on a processor whose oneDNN has blocks for it."""
    weight: Any = module._parameters.get("weight")
    return (
        getattr(type(module), "adopted_from", type(module)) is nn.Linear
        # What was put on the instance, as accelerate does, may be any other product.
        and not vars(module).keys() & {"forward", "instance_forward"}
        and type(weight) in PLAIN_TENSORS
        and weight.device.type == "cpu"
        and weight.layout == torch.strided
        and weight.numel() > 0
        and has_blocks(weight.dtype)
    )


@contextmanager
def reordered_linear(
    module: Any, reclass: Callable[[Any, type[nn.Module]], None], is_shared: bool = False
) -> Iterator[None]:
    """The module with its weight in blocks; afterwards its own parameter is there again, with the same numbers.

    Args:
        reclass: gives the module another class, under whatever is mixed in front of it.
        is_shared: another module has the parameter too, so that it stays as it is beside the blocks.
    """
    own: nn.Parameter = module._parameters["weight"]
    # Not as tensors of inference, wherever the caller is: it may train the model afterwards.
    with torch.inference_mode(False):
        blocks = in_blocks(own.detach())
        held = own if is_shared else nn.Parameter(blocks, requires_grad=False)
    module.__dict__["blocks"] = Blocks(held, blocks)
    try:
        reclass(module, LinearReordered)
        module._parameters["weight"] = held
        if not is_shared:
            own.data = own.data.new_empty(0)
        yield
    finally:
        if not own.numel():
            with torch.inference_mode(False):
                own.data = blocks.to_dense()
        module._parameters["weight"] = own
        reclass(module, nn.Linear)
        del module.__dict__["blocks"]


def in_blocks(weight_OI: Tensor) -> Tensor:
    """The weight as oneDNN multiplies by it, of the same shape and dtype; `to_dense` is the way back."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), _TOKENS)


def product(x: Tensor, blocks: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b, x (..., in) to (..., out), with W in blocks."""
    return torch.ops.mkldnn._linear_pointwise.default(x, blocks, bias_O, "none", [], "")


def held(weight_OI: Tensor) -> Tensor:
    """A weight as products of inference read it quickest: in blocks where there are any, else as it is."""
    return in_blocks(weight_OI) if weight_OI.device.type == "cpu" and has_blocks(weight_OI.dtype) else weight_OI


def written_out(held: Tensor) -> Tensor:
    """The weight (out, in) again."""
    return held if held.layout == torch.strided else held.to_dense()


def linear(x: Tensor, held: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b of a weight that is held, x (..., in) to (..., out)."""
    return F.linear(x, held, bias_O) if held.layout == torch.strided else product(x, held, bias_O)


def add_linear(y: Tensor, x: Tensor, held: Tensor) -> Tensor:
    """y + x W^T of a weight that is held; y may be written over."""
    if held.layout == torch.strided:
        return y.add_(F.linear(x, held))
    # In one pass over y, where a product and a sum would take two.
    return torch.ops.mkldnn._linear_pointwise.binary(x, y, held, None, "add")


@functools.cache
def has_blocks(dtype: torch.dtype) -> bool:
    """Whether oneDNN has blocks for this dtype here, multiplies by them as torch does and gives the weight back."""
    if not torch.backends.mkldnn.is_available() or dtype not in _MOST_SPREAD:
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # It is emulated, and no product of it is quick.
        return False
    generator = torch.Generator().manual_seed(0)
    # Sizes that no block divides.
    weight_OI, x_TI, bias_O = (torch.randn(size, generator=generator).to(dtype) for size in ((67, 41), (3, 41), (67,)))
    try:
        with torch.inference_mode():
            blocks = in_blocks(weight_OI)
            y_TO, expected_TO = product(x_TI, blocks, bias_O), F.linear(x_TI, weight_OI, bias_O)
            is_same = torch.equal(blocks.to_dense(), weight_OI)
    except (RuntimeError, AttributeError):
        # None of these operators is promised by torch.
        return False
    most = _MOST_SPREAD[dtype] * float(expected_TO.abs().max())
    return is_same and float((y_TO - expected_TO).abs().max()) <= most
