"""The memory tracker: what every operation allocates, when it is freed, and which module it works for.

- `ModuleLocator` says to which module an operation belongs, in the forward pass and in the backward pass.
- `MemoryTracker` tracks all storages of real tensors, and counts operations and bytes moved.
- `FakeMemoryTracker` runs the same code on tensors without data, and tracks what it would allocate.

Real and fake tensors are tracked alike, so that a simulated step can be held against a real one.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from slimtune.errors import PlanError
from slimtune.plan.fake_results import result_of
from slimtune.plan.memory import Phase, Work

ALIVE = 2**62
"""When a storage dies that outlives the count."""

LARGEST_REAL = 2**20
"""Elements of the largest integers and flags that are kept real."""
_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_META = torch.device("meta")
_HIDDEN = frozenset({_DEVICE, torch.ops.aten.detach.default})
"""What allocates nothing and is called by the thousand."""


@dataclass(frozen=True)
class Location:
    """The module whose forward runs, or whose backward does, and whether the loss has been reached."""

    module: str = ""
    in_loss: bool = False


@dataclass
class Storage:
    """One storage: its size, the first and last operation that it is there for, and where it was made."""

    nbytes: int
    born: int
    died: int = ALIVE
    location: Location = Location()


@dataclass(frozen=True)
class Operation:
    """An operation that allocated."""

    time: int
    phase: Phase
    location: Location
    name: str


class ModuleLocator:
    """Where in the model a computation is; in a backward pass, by the sequence numbers of its nodes.

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
        self.marks: list[Location] = []
        self.current = Location()

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
        self.current = Location(path, self.after_head and path in ("", self.head))
        number = torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]
        if self.numbers and self.numbers[-1] == number:
            self.marks[-1] = self.current
        else:
            self.numbers.append(number)
            self.marks.append(self.current)

    def now(self) -> Location:
        """Where the operation that runs now belongs."""
        # In the forward pass a stack of modules says it; in the backward pass the sequence number of the autograd node,
        # which is that of the forward operation it belongs to.
        if self.stack:
            return self.current
        node = torch._C._current_autograd_node()
        if node is None:
            return self.current
        # numbers[i] is the sequence number at which marks[i] began to hold: the last one not above the node's.
        index = bisect_right(self.numbers, node._sequence_nr()) - 1
        # Gradients are accumulated by nodes outside of the sequence, right after the node that made them.
        if 0 <= index < len(self.marks) - 1:
            self.current = self.marks[index]
        return self.current

    @contextmanager
    def following(self) -> Iterator[None]:
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
        self.locator: ModuleLocator | None = None
        self.time = 0
        self.storages: list[Storage] = []
        self.operations: list[Operation] = []
        self.work: dict[Phase, Work] = {}
        self._known: dict[int, tuple[Storage, Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would wrap each of 100,000 calls, so that no compiler looks into them; none is there.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            # As FakeTensor itself answers: half of all calls, by whatever asks a tensor where it is.
            return _META if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
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
        new = [storage for tensor in outputs if (storage := self.track(tensor))]
        if new:
            location = Location() if self.locator is None else self.locator.now()
            for storage in new:
                storage.location = location
            self.operations.append(Operation(self.time, self.phase, location, str(func.overloadpacket)))
        self._measure(func, args, kwargs, result, outputs, bool(new))
        self.time += 1

    def _measure(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, outputs: list[Tensor], new: bool
    ) -> None:
        # Work in flops (2 for a multiply-add) and bytes: every argument read once, every result written once, no
        # caches.
        flops = flops_of(func, args, kwargs, result)
        # A view moves nothing, and an operation in place allocates nothing but writes.
        moves = new or func._schema.is_mutable
        moved = sum(tensor.nbytes for tensor in [*tensors_in(args), *outputs]) if moves else 0
        before = self.work.get(self.phase, Work())
        self.work[self.phase] = Work(before.flops + flops, before.bytes_moved + moved)

    def track(self, tensor: Tensor) -> Storage | None:
        """Count a tensor's storage from now on; gives back None for one that is counted already."""
        # The address of the storage object, not of its data: fake storages have none, and views share it.
        storage = tensor.untyped_storage()
        key = storage._cdata
        # What is on `meta` has a size and no memory.
        if key in self._known or tensor.is_meta or not (nbytes := storage.nbytes()):
            return None
        entry = Storage(self.rounded(nbytes), self.time)
        # Time counts operations, not seconds: `born` and `died` are indexes into the columns of the timeline.
        self.storages.append(entry)

        def freed(_: Any) -> None:
            # What the next operation no longer finds was there for this one.
            entry.died = self.time - 1
            self._known.pop(key, None)

        self._known[key] = entry, weakref.ref(storage, freed)
        return entry

    def peak_since(self, first: int) -> int:
        """The most bytes that were live at once of all storages but the first so many."""
        # Storages that died before their first operation ended were never live at one.
        made = [storage for storage in self.storages[first:] if storage.died >= storage.born]
        changes = [(s.born, s.nbytes) for s in made] + [(s.died + 1, -s.nbytes) for s in made]
        return max(accumulate((change for _, change in sorted(changes)), initial=0))

    def storages_of(self, tensors: Iterable[Tensor]) -> list[Storage]:
        """The live storages of tensors, those included that are counted from now on."""
        storages = {}
        for tensor in unwrapped(tensors):
            self.track(tensor)
            known = self._known.get(tensor.untyped_storage()._cdata)
            if known:
                storages[id(known[0])] = known[0]
        return list(storages.values())

    def live(self) -> list[Storage]:
        """All storages that are there now."""
        return [entry for entry, _ in self._known.values()]


class FakeMemoryTracker(MemoryTracker):
    """Tracks what operations on fake tensors would allocate; enter it inside of its `fake` mode.

    Numbers are fake; token ids, labels and masks are real, so that code which looks at them takes its usual way. Where
    a fake number is read all the same, the answer is 1 or True: a check passes, a bound holds.
    """

    def __init__(self, rounded: Callable[[int], int] | None = None, fake: FakeTensorMode | None = None) -> None:
        super().__init__(rounded)
        self.fake = fake or FakeTensorMode(allow_non_fake_inputs=True)

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        has_fake = any(isinstance(tensor, FakeTensor) for tensor in tensors_in((args, tuple(kwargs.values()))))
        if not has_fake and func in (_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default):
            return _really(func, args, kwargs)
        if func is _aten.native_batch_norm.out:
            # What it writes is there already; torch would trace its parts, which takes ten times as long.
            return tuple(kwargs[name] for name in ("out", "save_mean", "save_invstd"))
        if func is _aten.index.Tensor:
            args = (args[0], _by_position(args[1]))
        try:
            result = result_of(self.fake, func, args, kwargs) if has_fake else func(*args, **kwargs)
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
    # x[mask] has a shape that depends on data; x[positions] has one that is known.
    positions: list[Any] = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        positions += _really(_aten.nonzero.default, (index,), {}).unbind(1) if is_mask else [index]
    return positions


def _stays_real(result: Any) -> bool:
    tensors = list(tensors_in((result,)))
    return bool(tensors) and all(not t.is_floating_point() and t.numel() <= LARGEST_REAL for t in tensors)


def _really(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _answer(func: Any, args: tuple[Any, ...]) -> Any:
    if func is _aten.equal.default:
        return False
    # .item() of a fake number: True for flags and 1 for others let checks pass, NaN shows where a complex one is used.
    value: Tensor = args[0]
    return {torch.bool: True}.get(
        value.dtype, math.nan if value.is_complex() else 1.0 if value.is_floating_point() else 1
    )


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


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """How many a call took, a multiplication and its addition counted as two; 0 for what multiplies no matrices."""
    count = _COUNTS.get(func.overloadpacket)
    return int(count(*args, **kwargs, out_val=result)) if count else 0


def _spread(one: Any, query: Any) -> Any:
    """The shape of keys or values, a head for each head of the queries: torch 2.11 counts no groups of heads."""
    # (B, heads, T, width): with grouped queries keys have fewer heads, and the kernel computes for all heads of q.
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
