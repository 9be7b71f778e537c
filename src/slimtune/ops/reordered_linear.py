"""Weights of linear layers in the order in which oneDNN multiplies by them, while a processor decodes.

A product with few tokens takes much of its time to bring the weight (out, in) into blocks, anew each time. Held in
them, a weight takes as many bytes as before and is the same number for number; at most the products sum in another
order. Which blocks they are belongs to the machine and to the version of oneDNN: none is ever written to a file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
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
    """What a layer multiplies by.

    Attributes:
        weight, bias: the parameters that it is in place of: under others of an adapter's it doesn't count.
        held: the weight in blocks, of all layers that share the input.
        shared: these layers, where there are others.
        place: of this layer among them.
    """

    weight: nn.Parameter
    bias: Tensor | None
    held: Tensor
    shared: SharedInput | None = None
    place: int = 0


class SharedInput:
    """Layers that read one tensor, as queries, keys and values do, in one product.

    The layer that is called first computes for all. The others find theirs when they are called with the very same
    tensor, and the last one lets it go.

    Attributes:
        modules: in the order in which they are called.
        widths: their outputs.
    """

    def __init__(self, modules: Sequence[Any], held: Tensor) -> None:
        self.modules, self.held = tuple(modules), held
        self.widths = [module.out_features for module in modules]
        biases = [module.bias for module in modules]
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            filled = [
                torch.zeros(width, dtype=held.dtype) if bias is None else bias.detach()
                for bias, width in zip(biases, self.widths, strict=True)
            ]
            self.bias = torch.cat(filled)
        self._known: tuple[Tensor, object, Sequence[Tensor]] | None = None

    def product(self, x: Tensor) -> Tensor:
        """The outputs of all, side by side."""
        return product(x, self.held, self.bias)

    def part(self, place: int, x: Tensor, key: object, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """The output of one layer, a slice of what `compute` gives for all.

        Args:
            key: what else the outputs depend on; others of another key are computed anew.
        """
        known = self._known
        if known is None or known[0] is not x or known[1] is not key:
            known = self._known = x, key, compute(x).split(self.widths, -1)
        if place == len(self.modules) - 1:
            self._known = None
        return known[2][place]


class LinearReordered(nn.Linear):
    """An `nn.Linear` whose weight is in oneDNN's blocks, and (out, in) to whoever reads it."""

    blocks: Blocks
    reads: int
    """How often the weight was written out."""

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight (out, in), written out where it is in blocks alone."""
        own: Any = self._parameters["weight"]
        return own if own.device.type == "cpu" and own.layout == torch.strided else self._written_out()

    @property
    def looks(self) -> tuple[torch.Size, torch.dtype, torch.device]:
        """The weight's shape, dtype and device."""
        own: Any = self._parameters["weight"]
        # What stands in for it has no numbers, and so no device.
        return own.shape, own.dtype, self.blocks.held.device if own is self.blocks.weight else own.device

    def _written_out(self) -> Tensor:
        self.__dict__["reads"] += 1
        blocks = self.blocks
        dense = blocks.held.to_dense()
        return dense if blocks.shared is None else dense.split(blocks.shared.widths)[blocks.place].clone()

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x (..., in) to (..., out)."""
        if not self.takes(x):
            return F.linear(x, self.weight, self.bias)
        blocks = self.blocks
        if blocks.shared is None:
            return product(x, blocks.held, self.bias)
        if self.bias is blocks.bias:
            return blocks.shared.part(blocks.place, x, None, blocks.shared.product)
        y = product(x, blocks.held).split(blocks.shared.widths, -1)[blocks.place]
        return y if self.bias is None else y + self.bias

    def takes(self, x: Tensor) -> bool:
        """Whether x is multiplied in blocks: nothing is learned, cast, traced or planned, the weight is the layer's."""
        return (
            self._parameters["weight"] is self.blocks.weight
            and x.dtype == self.blocks.held.dtype
            and type(x) is Tensor
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not is_traced()
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight.detach()


def shared_input(module: Any, x: Tensor) -> SharedInput | None:
    """The layers that multiply x at once with this one, where there are others."""
    blocks: Blocks | None = vars(module).get("blocks")
    return blocks.shared if blocks is not None and module.takes(x) else None


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
def reordered(
    modules: Sequence[Any], reclass: Callable[[Any, type[nn.Module]], None], is_kept: bool = False
) -> Iterator[None]:
    """The modules with their weights in blocks; afterwards their own parameters are there again, the same numbers.

    Args:
        modules: one, or several that read the same tensor, in the order in which they are called.
        reclass: gives a module another class, under whatever is mixed in front of it.
        is_kept: the weight stays beside the blocks, as another module has it too; of one module alone.
    """
    own: list[nn.Parameter] = [module._parameters["weight"] for module in modules]
    # Not as tensors of inference, wherever the caller is: it may train the model afterwards.
    with torch.inference_mode(False), torch.no_grad():
        held = in_blocks(torch.cat([*own]) if len(own) > 1 else own[0].detach())
        shared = SharedInput(modules, held) if len(own) > 1 else None
        stand_ins = own if is_kept else [_stand_in(weight, held, shared) for weight in own]
    try:
        for place, (module, stand_in) in enumerate(zip(modules, stand_ins, strict=True)):
            module.__dict__ |= {"blocks": Blocks(stand_in, module.bias, held, shared, place), "reads": 0}
            reclass(module, LinearReordered)
            module._parameters["weight"] = stand_in
        for weight in () if is_kept else own:
            weight.data = weight.data.new_empty(0)
        yield
    finally:
        for module, weight in zip(modules, own, strict=True):
            if not weight.numel():
                with torch.inference_mode(False):
                    weight.data = module._written_out()
        for module, weight in zip(modules, own, strict=True):
            module._parameters["weight"] = weight
            reclass(module, nn.Linear)
            for name in ("blocks", "reads"):
                module.__dict__.pop(name, None)


def _stand_in(weight: Tensor, held: Tensor, shared: SharedInput | None) -> nn.Parameter:
    """What a module has in the place of its weight: alike, and without numbers to be read by mistake."""
    return nn.Parameter(held if shared is None else torch.empty_like(weight, device="meta"), requires_grad=False)


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
    """y + x W^T of a weight that is held, of tokens (T, in); y may be written over."""
    if held.layout != torch.strided:
        # In one pass over y, where a product and a sum would take two.
        return torch.ops.mkldnn._linear_pointwise.binary(x, y, held, None, "add")
    return y.addmm_(x, held.t()) if y.dtype == x.dtype else y.add_(F.linear(x, held))


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
