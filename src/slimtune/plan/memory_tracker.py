"""Counting live storages: what every operation allocates, when it is freed, and which module it works for.

It counts real tensors and fake ones alike, so that a simulated step can be held against a real one.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from slimtune.plan.memory import Phase, Work

ALIVE = 2**62
"""When a storage dies that outlives the count."""

_HIDDEN = frozenset({torch.ops.prim.device.default, torch.ops.aten.detach.default})
"""What allocates nothing and is called by the thousand."""


@dataclass(frozen=True)
class Place:
    """The module whose forward runs, or whose backward does, and whether the loss has been reached."""

    module: str = ""
    in_loss: bool = False


@dataclass
class Storage:
    """One storage: its size, the first and last operation that it is there for, and where it was made."""

    nbytes: int
    born: int
    died: int = ALIVE
    place: Place = Place()


@dataclass(frozen=True)
class Operation:
    """An operation that allocated."""

    time: int
    phase: Phase
    place: Place
    name: str


class Places:
    """Where in the model a computation is; a backward pass is told by the sequence numbers of its nodes.

    Args:
        head: the path of the output layer: what the root computes after it, or after the layers, is the loss.
    """

    def __init__(self, model: nn.Module, head: str) -> None:
        self.paths = {id(module): name for name, module in reversed(list(model.named_modules()))}
        self.head = head
        self.backbone = getattr(model, "base_model_prefix", "") or None
        self.stack: list[str] = []
        self.after_head = False
        self.numbers: list[int] = []
        self.marks: list[Place] = []
        self.current = Place()

    def _enter(self, module: nn.Module, args: Any) -> None:
        path = self.paths.get(id(module))
        if path is not None:
            self.after_head = path == self.head or (self.after_head and path != "")
            self.stack.append(path)
            self._mark()

    def _leave(self, module: nn.Module, args: Any, outputs: Any) -> None:
        if id(module) in self.paths and self.stack:
            # Where a loss multiplies by the weight of the head itself, the head isn't called.
            self.after_head |= self.stack.pop() == self.backbone
            self._mark()

    def _mark(self) -> None:
        path = self.stack[-1] if self.stack else ""
        self.current = Place(path, self.after_head and path in ("", self.head))
        number = torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]
        if self.numbers and self.numbers[-1] == number:
            self.marks[-1] = self.current
        else:
            self.numbers.append(number)
            self.marks.append(self.current)

    def now(self) -> Place:
        """Where the operation that runs now belongs."""
        if self.stack:
            return self.current
        node = torch._C._current_autograd_node()
        if node is None:
            return self.current
        found = bisect_right(self.numbers, node._sequence_nr()) - 1
        # Gradients are accumulated by nodes outside of the sequence, right after the node that made them.
        if 0 <= found < len(self.marks) - 1:
            self.current = self.marks[found]
        return self.current

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Follow the forwards of the model's modules."""
        hooks = [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class MemoryTracker(TorchDispatchMode):
    """All storages that operations allocate while it is entered, and what the operations compute and move.

    Args:
        rounded: what an allocator makes of a number of bytes.
    """

    def __init__(self, rounded: Callable[[int], int] | None = None) -> None:
        super().__init__()
        self.rounded = rounded or (lambda nbytes: nbytes)
        self.phase: Phase = "load"
        self.places: Places | None = None
        self.time = 0
        self.storages: list[Storage] = []
        self.operations: list[Operation] = []
        self.work: dict[Phase, Work] = {}
        self._known: dict[int, tuple[Storage, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            # torchao's tensors compute on what they wrap, which comes here by itself.
            return NotImplemented
        result = self.compute(func, args, kwargs or {})
        if func not in _HIDDEN:
            self._account(func, args, kwargs or {}, result)
        return result

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation itself."""
        return func(*args, **kwargs)

    def _account(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        outputs = list(tensors_in((result,)))
        new = [storage for tensor in outputs if (storage := self.see(tensor))]
        if new:
            place = Place() if self.places is None else self.places.now()
            for storage in new:
                storage.place = place
            self.operations.append(Operation(self.time, self.phase, place, str(func.overloadpacket)))
        self._measure(func, args, kwargs, result, outputs, bool(new))
        self.time += 1

    def _measure(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, outputs: list[Tensor], new: bool
    ) -> None:
        flops = flops_of(func, args, kwargs, result)
        # A view moves nothing, and an operation in place allocates nothing but writes.
        moves = new or func._schema.is_mutable
        moved = sum(tensor.nbytes for tensor in [*tensors_in(args), *outputs]) if moves else 0
        before = self.work.get(self.phase, Work())
        self.work[self.phase] = Work(before.flops + flops, before.bytes_moved + moved)

    def see(self, tensor: Tensor) -> Storage | None:
        """Count a tensor's storage from now on; gives back None for one that is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        # What is on `meta` has a size and no memory.
        if key in self._known or tensor.is_meta or not (nbytes := storage.nbytes()):
            return None
        entry = Storage(self.rounded(nbytes), self.time)
        self.storages.append(entry)

        def freed(_: Any) -> None:
            # What the next operation no longer finds was there for this one.
            entry.died = self.time - 1
            self._known.pop(key, None)

        self._known[key] = entry, weakref.ref(storage, freed)
        return entry

    def peak_since(self, first: int) -> int:
        """The most bytes that were live at once of all storages but the first so many."""
        made = [storage for storage in self.storages[first:] if storage.died >= storage.born]
        changes = [(s.born, s.nbytes) for s in made] + [(s.died + 1, -s.nbytes) for s in made]
        return max(accumulate((change for _, change in sorted(changes)), initial=0))

    def of(self, tensors: Iterable[Tensor]) -> list[Storage]:
        """The live storages of tensors, those included that are counted from now on."""
        found = {}
        for tensor in unwrapped(tensors):
            self.see(tensor)
            known = self._known.get(tensor.untyped_storage()._cdata)
            if known:
                found[id(known[0])] = known[0]
        return list(found.values())

    def live(self) -> list[Storage]:
        """All storages that are there now."""
        return [entry for entry, _ in self._known.values()]


def unwrapped(tensors: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors themselves, and what is stored of those that wrap others, as torchao's do."""
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            yield from unwrapped(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            yield tensor


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in arguments or results, lists of them included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


_aten = torch.ops.aten


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """How many a call took, a multiplication and its addition counted as two; 0 for what multiplies no matrices."""
    count = _COUNTS.get(func.overloadpacket)
    return int(count(*args, **kwargs, out_val=result)) if count else 0


def _spread(one: Any, query: Any) -> Any:
    """The shape of keys or values, a head for each head of the queries: torch 2.11 counts no groups of heads."""
    return torch.Size((*one.shape[:1], *query.shape[1:2], *one.shape[2:]))


def _attention(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, _spread(key, query), _spread(value, query))


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, _spread(key, query), _spread(value, query))


_KERNELS = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
_COUNTS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
    **{getattr(_aten, f"_scaled_dot_product_{kernel}"): _attention for kernel in _KERNELS},
    **{getattr(_aten, f"_scaled_dot_product_{kernel}_backward"): _attention_backward for kernel in _KERNELS},
}
