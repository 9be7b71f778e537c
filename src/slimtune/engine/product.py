"""Linear layers under the adapters of many rows at once, whatever their methods.

    h = o * (base(i * x) + ((i * x) A^T * M) B),   y = h + (f(h D^T + d) * N) U + p

A and B are the factors of all low-rank adapters in the batch, side by side, D and U those of all bottlenecks; M and N
leave each row its own adapter's ranks; i, o and p are looked up by row. The frozen product is the layer's own, so that
bases in few bits need nothing of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from slimtune.adapters.rows import RowAdapters, check_rows
from slimtune.core.frozen import deltas_of
from slimtune.engine.factors import Factors, JointFactors, Layout, Ranks, join, without
from slimtune.ops.reordered_linear import SharedInput, add_linear, linear, shared_input

MOST_WORK = {2: 65_536, 4: 16_384}
"""Rows times ranks up to which one product for all adapters costs less than one for each on its own rows, by the bytes
of a number."""


class RowPlaces(NamedTuple):
    """Where the rows of a batch are in the tables and the factors.

    Attributes:
        own: the place of each row's adapter in the tables, (rows,).
        low_rank, bottlenecks: where a rank is another adapter's than the row's, (rows, ranks); None where rows run by
            adapter.
        groups: the rows of each adapter.
        is_bare: whether no row has an adapter with factors.
    """

    own: Tensor
    low_rank: Tensor | None
    bottlenecks: tuple[Tensor | None, ...]
    groups: Mapping[str, Tensor]
    is_bare: bool


class Ready(NamedTuple):
    """How a layer runs under the adapters of one batch.

    Attributes:
        adapters: those of the batch.
        apart: of them, those whose change at this layer has no form by rows.
        joint: the others' factors.
        shared: the layers that these factors are for, where they are for several.
    """

    adapters: frozenset[str]
    apart: frozenset[str]
    joint: JointFactors
    shared: SharedInput | None


class RowProduct:
    """The products of all layers of one model, with the factors of the adapters that were in use lately.

    Layers that read one tensor in one product (`SharedInput`) have one for their adapters too.

    Args:
        rank_budget: the sum of ranks up to which adapters that left the batch are kept beside those in it.
    """

    def __init__(self, rank_budget: int) -> None:
        self.rank_budget = rank_budget
        self._joint: dict[nn.Module | SharedInput, JointFactors] = {}
        # Of the last batch alone, whose steps follow each other: kept for each batch that there was, they would fill
        # the memory of a server.
        self._ready: dict[nn.Module, Ready] = {}
        # A layout goes with the last layer that has it.
        self._layouts: WeakValueDictionary[Any, Layout] = WeakValueDictionary()

    def forget(self, name: str | None = None) -> None:
        """Read an adapter anew, or all: it has gone, or may have been trained."""
        # What is joined beside it stays: a server that lets adapters go to make room would join all anew each time.
        rest = {} if name is None else {unit: without(each, name) for unit, each in self._joint.items()}
        self._joint = {unit: self._laid_out(each) for unit, each in rest.items() if each is not None}
        kept = set(map(id, self._joint.values()))
        self._ready = {m: r for m, r in self._ready.items() if id(r.joint) in kept and name not in r.adapters}

    def __call__(
        self, module: Any, frozen: Callable[..., Any], rows: RowAdapters, x: Tensor
    ) -> tuple[Tensor, Collection[str]]:
        ready = self._ready.get(module)
        if ready is None or ready.adapters != rows.distinct:
            # The first step of a batch of these adapters; those that follow find it.
            check_rows(module, rows)
            ready = self._ready[module] = self._made_ready(module, rows, x)
        if ready.shared is None:
            return _product(functools.partial(frozen, module), ready.joint, rows, x), ready.apart
        compute = functools.partial(_product, ready.shared.product, ready.joint, rows)
        return ready.shared.part(module.blocks.place, x, rows, compute), ready.apart

    def _made_ready(self, module: Any, rows: RowAdapters, x: Tensor) -> Ready:
        shared, joint = shared_input(module, x), None
        # One without any adapter computes for itself, and all others would compute once more for theirs.
        if shared is not None and all(hasattr(each, "adopted_base") for each in shared.modules):
            joint = self._factors(shared, shared.modules, rows, x.dtype)
        if joint is None or not joint.is_joint:
            shared, joint = None, self._factors(module, (module,), rows, x.dtype)
        own = deltas_of(module)
        apart = frozenset(name for name in rows.distinct if name in own and name not in joint.present[module])
        return Ready(rows.distinct, apart, joint, shared)

    def _factors(
        self, unit: nn.Module | SharedInput, modules: Sequence[Any], rows: RowAdapters, dtype: torch.dtype
    ) -> JointFactors:
        """The factors of the adapters in the batch, and of those that were, as far as the budget reaches."""
        known = self._joint.get(unit)
        there = {name for module in modules for name in deltas_of(module)}
        wanted = [name for name in dict.fromkeys(rows.names) if name in there]
        if known is not None and known.seen.issuperset(wanted):
            return known
        joint = join(known, modules, wanted, self.rank_budget * len(modules), dtype)
        self._joint[unit] = joint = self._laid_out(joint)
        return joint

    def _laid_out(self, joint: JointFactors) -> JointFactors:
        """With the one layout that all layers alike have."""
        layout = self._layouts.setdefault(joint.layout.key, joint.layout)
        return joint if layout is joint.layout else replace(joint, layout=layout)


def _product(base: Callable[[Tensor], Tensor], joint: JointFactors, rows: RowAdapters, x: Tensor) -> Tensor:
    """What a layer computes, or several that read x, each row under its own adapter; `base` is without any."""
    layout = joint.layout
    places = rows.cached(layout, x, lambda: _places(layout, rows, x)) if layout.names else None
    if places is None or places.is_bare:
        return base(x)
    if joint.inputs is not None:
        x = x * joint.inputs.rows[places.own].view_as(x)
    x_TI, y = x.reshape(-1, x.shape[-1]), base(x)
    # Of a new tensor, which what follows is added to in place, or a slice of one that nobody else reads.
    y_TO = y.reshape(-1, y.shape[-1])
    if joint.low_rank is not None:
        y_TO = _added(y_TO, x_TI, joint.low_rank, layout.low_rank, places.low_rank, places.groups)
    if joint.outputs is not None:
        y_TO.mul_(joint.outputs.rows[places.own])
    for factors, ranks, others in zip(joint.bottlenecks, layout.bottlenecks, places.bottlenecks, strict=True):
        y_TO = _added(y_TO, y_TO, factors, ranks, others, places.groups)
    if joint.biases is not None:
        y_TO.add_(joint.biases.rows[places.own])
    return y_TO.view(*x.shape[:-1], -1)


def _places(layout: Layout, rows: RowAdapters, x: Tensor) -> RowPlaces:
    groups = rows.groups(x)
    index_T = torch.full((x.shape[rows.dim(x)],), len(layout.names), device=x.device)
    for place, name in enumerate(layout.names):
        if name in groups:
            index_T[groups[name]] = place
    most = MOST_WORK.get(x.element_size(), 0)

    def others(ranks: Ranks) -> Tensor | None:
        if len(index_T) * sum(ranks.values()) > most:
            return None
        owners = [layout.names.index(name) for name, rank in ranks.items() for _ in range(rank)]
        return index_T[:, None] != torch.tensor(owners, device=index_T.device)

    is_bare = groups.keys().isdisjoint(layout.names)
    return RowPlaces(index_T, others(layout.low_rank), tuple(map(others, layout.bottlenecks)), groups, is_bare)


def _added(
    y_TO: Tensor, h: Tensor, factors: Factors, ranks: Ranks, others: Tensor | None, groups: Mapping[str, Tensor]
) -> Tensor:
    """Each row of y, which may be written over, with what its own adapter's pair gives of the same row of h."""
    if others is not None:
        # Written over and not multiplied by zero: what one adapter makes infinite must not reach other rows.
        return add_linear(y_TO, factors.inner(h).masked_fill_(others, 0.0), factors.b)
    for name, own in factors.each(ranks):
        if name in groups:
            # The joint product costs the sum of ranks for each row; here each adapter meets its own rows alone.
            change = linear(own.inner(h[groups[name]]), own.b)
            y_TO.index_add_(0, groups[name], change.to(y_TO.dtype))
    return y_TO
