"""A frozen module: how it keeps its weight, where it is in the model, and what it computes with other tensors in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from slimtune.core.roles import Role, role_of

Dense = dict[str, Tensor]
"""The parameters of one module by name, `weight` as (out, in, ...): what a change is folded into."""

Kind = Literal["linear", "conv", "embedding", "other"]

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names of modules that torch.compile, FSDP and activation checkpointing put around another; never in a file."""


class TensorSpec(NamedTuple):
    """What a weight looks like as (out, in, ...), known without expanding it; `dtype` is what it is computed in."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Base(ABC):
    """How one kind of frozen module keeps its weight: read as dense, written back, never more.

    Attributes:
        module_types: the modules that it is for; by full name where importing them takes long.
    """

    kind: ClassVar[Kind]
    module_types: ClassVar[tuple[type[nn.Module] | str, ...]]
    is_transposed: ClassVar[bool] = False
    """Whether the weight is stored as (in, out)."""

    @abstractmethod
    def features(self, module: Any) -> tuple[int, int]:
        """(in_features, out_features) of the map that the module computes."""

    def weight(self, module: Any) -> Tensor:
        """The weight as (out, in, ...), a view of the stored one where that is possible."""
        return module.weight.t() if self.is_transposed else module.weight

    def turned(self, stored: Tensor) -> Tensor:
        """A dense weight that is laid out as the module stores it, as (out, in, ...)."""
        return stored.t() if self.is_transposed else stored

    def spec(self, module: Any) -> TensorSpec:
        """The weight's shape, dtype and device."""
        weight = self.weight(module)
        return TensorSpec(weight.shape, weight.dtype, weight.device)

    def stored_as(self, module: nn.Module) -> str:
        """Names of the dtypes in which the module stores its parameters, or else its buffers: 'bfloat16/uint8'."""
        return dtypes_of(module.parameters(recurse=False)) or dtypes_of(module.buffers(recurse=False))

    def held(self, module: nn.Module) -> list[Tensor]:
        """All tensors that the module itself keeps."""
        return [*module.parameters(recurse=False), *module.buffers(recurse=False)]

    def dequantizer(self, module: Any) -> Callable[[], Tensor] | None:
        """What expands the weight once more, so that a backward pass need not keep it; None where it is kept anyway."""
        return None

    def for_few_tokens(self, module: Any, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """`x W^T` without expanding W, where that is quicker: few tokens, and nothing to learn."""
        return None

    def bias(self, module: Any) -> Tensor | None:
        """The bias that the module adds to its output, if it has one."""
        own = getattr(module, "bias", None)
        # torch's own quantized layers have a method of that name.
        return own if own is None or isinstance(own, Tensor) else own()

    def floating(self, module: nn.Module, name: str) -> Tensor | None:
        """A parameter of the module in floating point, laid out as a dense module stores it."""
        return getattr(module, name)

    def dense(self, module: nn.Module) -> Dense:
        """All parameters of the module by name, the weight as (out, in, ...)."""
        own = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
        return own | {"weight": self.weight(module).detach()} if "weight" in own else own

    def repack(self, module: nn.Module, dense: Dense) -> Dense:
        """The inverse of `dense`: the tensors as the module stores them."""
        # Contiguous: safetensors refuses strided tensors, and a Conv1D's product wants its rows in order.
        return dense | {"weight": dense["weight"].t().contiguous()} if self.is_transposed else dense

    def is_textbook(self, module: nn.Module) -> bool:
        """Whether the module computes its kind's textbook product and nothing else."""
        # By the function and not by the class: a subclass that leaves `forward` alone is as good, one with its own
        # isn't.
        forward = getattr(type(module), "adopted_from", type(module)).forward
        return forward in {kind.forward for kind in self.module_types if not isinstance(kind, str)}

    def may_fuse(self, module: nn.Module) -> bool:
        """Whether a fused product may stand in for the module's own: a textbook one with a frozen weight."""
        return False


@dataclass(frozen=True)
class Site:
    """One place where a delta attaches: the module, its name in the model and its kind of base.

    The model itself is a site too, with an empty name.
    """

    name: str
    module: Any
    base: Base

    @property
    def kind(self) -> Kind:
        return self.base.kind

    @property
    def spec(self) -> TensorSpec:
        """The shape, dtype and device of its weight."""
        return self.base.spec(self.module)

    @property
    def role(self) -> Role | None:
        """What the module does in its block, where that can be told."""
        return role_of(self.name)


class Frozen:
    """What a delta is put around in one call of a module: called, it is what that computes without the delta.

    Args:
        call: takes the module first, so that it can be run on a copy of it with other tensors.
    """

    __slots__ = ("_weight", "base", "call", "module")

    def __init__(self, module: Any, base: Base, call: Callable[..., Any]) -> None:
        self.module, self.base, self.call = module, base, call
        # For this call alone: kept beyond it, an expanded weight would undo what the codes save.
        self._weight: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.module, *args, **kwargs)

    def under(self, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """What it computes with these tensors in place of the module's own parameters and buffers."""
        return call_under(self.module, tensors, self.call, *args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """The frozen weight as (out, in, ...), expanded once."""
        if self._weight is None:
            self._weight = self.base.weight(self.module)
        return self._weight

    @property
    def bias(self) -> Tensor | None:
        """The bias that the module adds to its output, if it has one."""
        return self.base.bias(self.module)


def deltas_of(module: Any) -> Mapping[str, Any]:
    """The deltas of an adopted module by adapter; the root and the head are adopted without having any."""
    return module._modules.get("deltas", {})


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """A shallow copy of the module, of its plain class, with these tensors in place of its parameters and buffers.

    The module itself isn't touched, so that other threads may run it meanwhile.
    """
    # Without `__init__`, which would allocate and initialise a weight as large as the module's.
    copied: Any = object.__new__(getattr(type(module), "adopted_from", type(module)))
    own = vars(module)
    vars(copied).update(own)
    # New dictionaries, the old tensors: an assignment on the copy can't reach the module.
    vars(copied)["_parameters"] = {name: tensors.get(name, own) for name, own in module._parameters.items()}
    vars(copied)["_buffers"] = {name: tensors.get(name, own) for name, own in module._buffers.items()}
    vars(copied)["_modules"] = {n: child for n, child in module._modules.items() if not holds_deltas(module, n)}
    return copied


def call_under(module: Any, tensors: Mapping[str, Tensor], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`call(module, ...)` with these tensors in place of the module's own parameters and buffers."""
    if torch.compiler.is_compiling() or "instance_forward" in vars(module):
        # A compiler traces an exchange and never does it; a forward that was put on the instance is bound to it.
        with standing_in(module, tensors):
            return call(module, *args, **kwargs)
    # A copy and not an exchange: threads of a server run one module under several adapters at once.
    copied = with_tensors(module, tensors)
    before = dict(vars(copied))
    result = call(copied, *args, **kwargs)
    # What a forward notes on its module, as a router its losses, is looked for there.
    vars(module).update({name: value for name, value in vars(copied).items() if value is not before.get(name, before)})
    return result


@contextmanager
def standing_in(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """These tensors in the very module for a while; no other thread may use it then."""
    slots: dict[str, Any] = {n: module._parameters if n in module._parameters else module._buffers for n in tensors}
    own = {name: slot[name] for name, slot in slots.items()}
    for name, tensor in tensors.items():
        slots[name][name] = tensor
    try:
        yield
    finally:
        for name, tensor in own.items():
            slots[name][name] = tensor


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the module's state; constants that aren't stored are none."""
    return {
        name: buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def dtypes_of(tensors: Iterable[Tensor]) -> str:
    """Names of the dtypes of some tensors, e.g. 'float32/uint8'."""
    return "/".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def holds_deltas(module: nn.Module, name: str) -> bool:
    """Whether the child of this name is the container of the deltas on an adopted module."""
    return name == "deltas" and hasattr(module, "adopted_from")


def walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules of the base by path, a module that is used in two places under each of its paths.

    What torch.compile, FSDP or checkpointing wrapped has the path that it has without the wrapper.
    """
    yield prefix, model
    for name, child in model._modules.items():
        if child is not None and not holds_deltas(model, name):
            yield from walk(child, prefix if name in WRAPPERS else f"{prefix}.{name}" if prefix else name)


def without_wrappers(path: str) -> str:
    """A module's path without the names of wrappers in it."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)
