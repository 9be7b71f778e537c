"""Attach in place: a module is re-classed so that its forward runs the active deltas around its own.

No parameter of the base changes its name, `isinstance` stays true, and detaching leaves the very same tensors.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from slimtune.adapters.layer_views import layer_views
from slimtune.adapters.lazy_logits import LazyLogits
from slimtune.adapters.rows import RowAdapters, run_rows
from slimtune.bases import base_of, base_of_type
from slimtune.core.frozen import Base, Dense, Frozen, call_under, deltas_of
from slimtune.errors import AdapterNotFoundError, MergeError, did_you_mean, listing
from slimtune.fused import fused_for
from slimtune.ops.autograd import is_traced


@dataclass(frozen=True)
class Call:
    """What holds for the calls inside a `with` block alone, in the thread or task that entered it.

    Attributes:
        applied: the adapters to run through, whichever are active; None for those.
        rows: with `adapter_names`, the adapter of each row of the batch.
        lazy_head: while a loss is computed, the output layer whose logits stay uncomputed.
        inside: in a call of TRL's forward, the one that it runs inside of what adapters put around the model.
    """

    applied: tuple[str, ...] | None = None
    rows: RowAdapters | None = None
    lazy_head: nn.Module | None = None
    inside: Callable[..., Any] | None = None


_PLAIN_CALL = Call()
_calls: ContextVar[Mapping[int, Call]] = ContextVar("calls", default=MappingProxyType({}))
"""By the id of an `AdapterState`; it is alive as long as it is in here."""
# Reentrant: `unmerged` merges under it, and a merge opens calls of its own.
_lock = threading.RLock()


@dataclass(eq=False)
class AdapterState:
    """All that a model knows of its adapters; the model and its adopted modules look at one and the same object.

    Attributes:
        configs: the config of each adapter by its name.
        active: the adapters that are in effect unless they are merged or disabled.
        enabled: whether unmerged adapters are in effect at all.
        merged: the adapters that are written into the weights.
        replaced: (module, its tensors by name) from before that merge, in the order in which they were replaced.
        blocks: how many `disable_adapter` blocks are open, of all threads.
        merge_after: the adapters to merge again after the last of them.
        trained_before: the names of the parameters that needed gradients before the first adapter came.
        vocabulary: how many tokens the model had then, where it has any.
        return_logits: whether a causal model in training gives its logits beside its loss.
        open_calls: the calls with settings of their own, the latest last; compiled code can't see which is its own.
        latest_call: the last of them.
    """

    configs: dict[str, Any] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    enabled: bool = True
    merged: tuple[str, ...] = ()
    replaced: list[tuple[nn.Module, Dense]] = field(default_factory=list)
    blocks: int = 0
    merge_after: tuple[str, ...] = ()
    trained_before: frozenset[str] = frozenset()
    vocabulary: int | None = None
    return_logits: bool = False
    open_calls: list[Call] = field(default_factory=list)
    latest_call: Call = _PLAIN_CALL

    @property
    def call(self) -> Call:
        """What holds for this call."""
        # Compilers can't trace a context variable, and would not compile anew when it changes; they guard a field.
        return self.latest_call if torch.compiler.is_compiling() else _calls.get().get(id(self), _PLAIN_CALL)

    @property
    def applied(self) -> tuple[str, ...]:
        """The adapters that a forward runs through."""
        # None means "the active ones", and () means none at all: not to be mixed up by truth.
        chosen = self.call.applied
        if chosen is not None:
            return chosen
        return tuple(name for name in self.active if name not in self.merged) if self.enabled else ()

    def check_known(self, *names: str) -> None:
        """See that there are adapters of these names. Raises: AdapterNotFoundError."""
        for name in names:
            if name not in self.configs:
                raise AdapterNotFoundError(
                    f"Adapter {name} does not exist: '{name}' is none of {listing(self.configs) or 'no adapters'}"
                    f"{did_you_mean(name, self.configs)}"
                )

    def check_unmerged(self, name: str, act: str) -> None:
        """See that an adapter isn't in the weights. Raises: MergeError, which says what was to be done to it."""
        if name in self.merged:
            raise MergeError(f"Cannot {act} adapter(s) {[name]} while they are merged. Please unmerge them first.")

    @contextmanager
    def using(self, **settings: Any) -> Iterator[None]:
        """Settings of `Call` for the calls inside, of this thread or task alone."""
        call = replace(self.call, **settings)
        # A new mapping and not an update of the old one: another context may be holding that.
        token = _calls.set({**_calls.get(), id(self): call})
        with _lock:
            self.open_calls.append(call)
            self.latest_call = call
        try:
            yield
        finally:
            with _lock:
                # By identity: two threads may hold calls that are equal.
                self.open_calls = [each for each in self.open_calls if each is not call]
                self.latest_call = self.open_calls[-1] if self.open_calls else _PLAIN_CALL
            _calls.reset(token)

    @contextmanager
    def unmerged(self, unmerge: Callable[[], None], merge: Callable[[tuple[str, ...]], None]) -> Iterator[None]:
        """Unmerged while any thread is inside; the last one out merges again what was merged."""
        with _lock:
            self.blocks += 1
            if self.merged:
                self.merge_after = self.merged
                unmerge()
        try:
            yield
        finally:
            with _lock:
                self.blocks -= 1
                if self.merge_after and not self.blocks:
                    names, self.merge_after = self.merge_after, ()
                    merge(names)

    def __getstate__(self) -> dict[str, Any]:
        # A copy that is made inside a `with` block is outside of it.
        return vars(self) | {"open_calls": [], "latest_call": _PLAIN_CALL, "blocks": 0, "merge_after": ()}


class Adopted(nn.Module):
    """Mixed in front of a module's class: its forward is the active deltas' formulas around the class's own.

    Attributes:
        adopted_from: the module's class before.
        adopted_by: the subclass of this one that stands in front of it.
    """

    adopted_from: ClassVar[type[nn.Module]]
    adopted_by: ClassVar[type[Adopted]]
    adopted_base: ClassVar[Base]
    deltas: nn.ModuleDict
    adapter_state: AdapterState

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.adapter_state.call
        frozen = frozen_forward(self)
        # Only inside of a model's own forward that computes a loss: whoever calls the head elsewhere gets real logits.
        if call.lazy_head is self:
            return LazyLogits(args[0], self, functools.partial(run, self, frozen))
        if call.rows is not None:
            return run_rows(self, frozen, lambda name: _composed(self, frozen, (name,)), call.rows, *args, **kwargs)
        return run(self, frozen, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so that pickle and deepcopy can't find it by its name.
        # What follows is the instance's whole state, hooks included, so that nn.Module's own unpickling isn't needed.
        return _rebuild, (self.adopted_from, self.adopted_by), self.__dict__.copy()

    @staticmethod
    def _members_for(module_type: type[nn.Module]) -> dict[str, Any]:
        """What the class that is made for a module type has besides."""
        return {}


def _rebuild(module_type: type[nn.Module], mixin: type[Adopted]) -> nn.Module:
    # `__new__` without `__init__`: the tensors come with the state, and are not to be allocated twice.
    made = adopted_class(module_type, mixin)
    return made.__new__(made)


def _unless_applied(name: str) -> property:
    def value(self: Any) -> Any:
        is_adapted = self.adapter_state.applied or self.adapter_state.call.rows is not None
        return False if is_adapted else self.__dict__[name]

    return property(value)


FAST_PATHS = {name: _unless_applied(name) for name in ("activation_relu_or_gelu", "use_nested_tensor")}
"""What opens the fast path of torch's own transformer encoders, shut while adapters are in effect."""
ENCODERS = (nn.TransformerEncoderLayer, nn.TransformerEncoder)


class WithoutFastPath(Adopted):
    """Mixed in front of torch's own transformer encoders, whose fast path reads weights past the modules' forwards."""

    @staticmethod
    def _members_for(module_type: type[nn.Module]) -> dict[str, Any]:
        return FAST_PATHS


def attach_to(module: Any, name: str, delta: nn.Module) -> None:
    """Put a delta on an adopted module."""
    # Not before there is one: a root that is an nn.Sequential would run an empty container as its last layer.
    if "deltas" not in module._modules:
        module.deltas = nn.ModuleDict()
    module.deltas[name] = delta


def frozen_forward(module: Any) -> Callable[..., Any]:
    """What an adopted module computes without any adapter, as a function of the module and its inputs."""
    on_instance = vars(module).get("instance_forward")
    return type(module).adopted_from.forward if on_instance is None else functools.partial(_unbound, on_instance)


def _unbound(bound: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
    return bound(*args, **kwargs)


def run(module: Any, frozen: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the module computes under the adapters in effect."""
    return _composed(module, frozen, module.adapter_state.applied)(module, *args, **kwargs)


def _composed(module: Any, frozen: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """The deltas of these adapters around the frozen forward, the first innermost; like that, it takes the module."""
    call = frozen
    own = deltas_of(module)
    deltas = [own[name] for name in names if name in own]
    # Of the class and not looked up: this runs in every layer at every step of decoding.
    base = module.adopted_base
    for delta in deltas:
        # The compiler fuses the plain formula itself, and can't trace the look-up in the table; transforms take no node
        # of ours. A forward that was put on the instance is more than the product that a node would compute.
        may_fuse = call is frozen and not is_traced() and "instance_forward" not in vars(module)
        fused = fused_for(type(delta), type(base)) if may_fuse else None
        call = functools.partial(_around, delta, fused, base, call)
    for delta in deltas:
        # Outermost: stand-ins must be there when the innermost formula reads the module's weight.
        if delta.holds:
            call = functools.partial(_held, delta, call)
    return call


def _around(delta: Any, fused: Any, base: Base, call: Callable[..., Any], module: Any, *args: Any, **kw: Any) -> Any:
    around = Frozen(module, base, call)
    return fused(delta, module, around, *args, **kw) if fused else delta(around, *args, **kw)


def _held(delta: Any, call: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
    return call_under(module, delta.stand_ins(), call, *args, **kwargs)


def adopt(module: nn.Module, adapter_state: AdapterState, mixin: type[Adopted] = Adopted) -> Any:
    """Re-class the module in place; a module that is adopted already stays as it is."""
    if isinstance(module, mixin):
        return module
    # A forward put on the instance (accelerate's offloading does it) would hide the class's; it becomes the base.
    if "forward" in module.__dict__:
        module.__dict__["instance_forward"] = module.__dict__.pop("forward")
    module.__class__ = adopted_class(type(module), mixin)
    # Past nn.Module's `__setattr__`, which a PeftModel has one of its own in front of.
    vars(module)["adapter_state"] = adapter_state
    return module


def reclass(module: Any, module_type: type[nn.Module]) -> None:
    """Make the module one of another type, in place, under what it may be adopted by."""
    mixin = getattr(type(module), "adopted_by", None)
    module.__class__ = module_type if mixin is None else adopted_class(module_type, mixin)


def adopt_head(model: Any, adapter_state: AdapterState) -> None:
    """Adopt the model's output layer, whose logits may stay uncomputed."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and base_of(head).kind == "linear":
        adopt(head, adapter_state)


def release(module: Any) -> None:
    """Give the module its own class back; its tensors are the very same ones."""
    if "instance_forward" in module.__dict__:
        module.__dict__["forward"] = module.__dict__.pop("instance_forward")
    if "deltas" in module._modules:
        del module.deltas
    # The order matters: the class goes last, for the deletions above are those of an adopted module.
    del module.adapter_state
    module.__class__ = type(module).adopted_from


@functools.cache
def adopted_class(module_type: type[nn.Module], mixin: type[Adopted]) -> type[nn.Module]:
    """The class that puts `mixin` in front of a module type.

    It bears the type's own name: transformers looks layers and models up by it.
    """
    members = {name: getattr(module_type, name) for name in ("__module__", "__qualname__", "__doc__")}
    members |= {"adopted_from": module_type, "adopted_by": mixin, "adopted_base": base_of_type(module_type)}
    # Behind what the mixin has: on the root `set_adapter` is PeftModel's, on a layer it is the view.
    views = {name: view for name, view in layer_views().items() if not hasattr(mixin, name)}
    return type(module_type.__name__, (mixin, module_type), views | members | mixin._members_for(module_type))
