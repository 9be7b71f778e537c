"""Linear layers under the adapters of many rows at once, whatever their methods.

    h = o * (base(i * x) + ((i * x) A^T * M) B),   y = h + (f(h D^T + d) * N) U + p

A and B are the factors of all low-rank adapters in the batch, side by side, D and U those of all bottlenecks; M and N
leave each row its own adapter's ranks; i, o and p are looked up by row. The frozen product is the layer's own, so that
bases in few bits need nothing of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from slimtune.adapters.adopt import frozen_forward
from slimtune.adapters.rows import RowAdapters, check_rows
from slimtune.core.delta import RowParts
from slimtune.core.frozen import Frozen, deltas_of
from slimtune.ops.reordered_linear import SharedInput, add_linear, held, linear, shared_input, written_out

MOST_WORK = {2: 65_536, 4: 16_384}
"""Rows times ranks up to which one product for all adapters costs less than one for each on its own rows, by the bytes
of a number."""


Ranks = Mapping[str, int]
"""How many ranks each adapter has in some factors, in the order in which they lie there."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Which adapters a layer has at hand, in their order, and their ranks in its low-rank pairs and its bottlenecks.

    One object for all layers alike: what follows from it and from the rows is made once a step, and found by the
    object. Comparing names would take longer than a small product.
    """

    names: tuple[str, ...]
    low_rank: Ranks
    bottlenecks: tuple[Ranks, ...]


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


@dataclass(frozen=True)
class Factors:
    """The pairs of several adapters behind each other: f(h A^T + bias) B.

    Attributes:
        a, b: (R, in) and (out, R), held as their products read them quickest.
        bias: (R,), or None.
        activation: f, of a bottleneck, whose h is the layer's output; None for a low-rank pair, which reads its input.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    activation: Callable[[Tensor], Tensor] | None = None

    def inner(self, h: Tensor) -> Tensor:
        """f(h A^T + bias), (tokens, R), as a new tensor."""
        z_TR = linear(h, self.a, self.bias)
        return z_TR if self.activation is None else self.activation(z_TR)

    def each(self, ranks: Ranks) -> Iterator[tuple[str, Factors]]:
        """Those of each adapter, as views."""
        a_RI, b_OR = written_out(self.a), written_out(self.b)
        begin = 0
        for name, rank in ranks.items():
            own = slice(begin, begin := begin + rank)
            bias = None if self.bias is None else self.bias[own]
            yield name, Factors(a_RI[own], b_OR[:, own], bias, self.activation)


@dataclass(frozen=True)
class JointFactors:
    """What several adapters change at one layer, or at several that read one tensor, in its dtype.

    Attributes:
        seen: the adapters that were looked at; some may have no form of this kind.
        present: those that have, by layer.
        is_joint: whether the layers can have one product, so that what follows is of use.
        layout: the adapters in what follows.
        low_rank, bottlenecks: their pairs, a bottleneck's by the activation.
        inputs, outputs, biases: tables of i, o and p, a row for each adapter and a neutral one at the end; None where
            all are neutral.
    """

    seen: frozenset[str]
    present: Mapping[nn.Module, frozenset[str]]
    is_joint: bool
    layout: Layout
    low_rank: Factors | None
    bottlenecks: tuple[Factors, ...]
    inputs: Tensor | None
    outputs: Tensor | None
    biases: Tensor | None


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
        # What is joined without it stays: a server that lets adapters go to make room would join all anew each time.
        self._joint = {unit: j for unit, j in self._joint.items() if name is not None and name not in j.seen}
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
        # Adapters come and go by the step: without those that left, two clients in turn would have all factors joined
        # anew each time.
        left = [name for name in (known.layout.names if known else ()) if name in there and name not in wanted]
        changes: dict[str, list[RowParts | None]] = {}
        ranks, most = 0, self.rank_budget * len(modules)
        for name in (*wanted, *left):
            own = [_change(module, name) for module in modules]
            rank = sum(map(_rank, filter(None, own)))
            if any(own) and (name in wanted or ranks + rank <= most):
                changes[name], ranks = own, ranks + rank
        seen = frozenset(wanted) | changes.keys()
        present = {m: frozenset(n for n, own in changes.items() if own[i] is not None) for i, m in enumerate(modules)}
        joint = self._joint[unit] = self._side_by_side(seen, present, _together(changes, modules), dtype)
        return joint

    def _side_by_side(
        self, seen: frozenset[str], present: Mapping[Any, frozenset[str]], parts: Mapping[str, RowParts] | None,
        dtype: torch.dtype,
    ) -> JointFactors:  # fmt: skip
        is_joint, parts = parts is not None, parts or {}

        def table(name: str, neutral: float) -> Tensor | None:
            vectors = [getattr(each, name) for each in parts.values()]
            like = next((vector for vector in vectors if vector is not None), None)
            if like is None:
                return None
            none = torch.full_like(like, neutral)
            return torch.stack([*(none if vector is None else vector for vector in vectors), none]).to(dtype)

        ranks, low_rank = _low_rank(parts, dtype)
        bottlenecks = _bottlenecks(parts, dtype)
        layout = Layout(tuple(parts), ranks, tuple(each for each, _ in bottlenecks))
        # By its ranks too: an adapter's next version may have others.
        key = layout.names, *(tuple(each.items()) for each in (layout.low_rank, *layout.bottlenecks))
        return JointFactors(
            seen=seen,
            present=present,
            is_joint=is_joint,
            layout=self._layouts.setdefault(key, layout),
            low_rank=low_rank,
            bottlenecks=tuple(factors for _, factors in bottlenecks),
            inputs=table("input", 1.0),
            outputs=table("output", 1.0),
            biases=table("bias", 0.0),
        )


def _product(base: Callable[[Tensor], Tensor], joint: JointFactors, rows: RowAdapters, x: Tensor) -> Tensor:
    """What a layer computes, or several that read x, each row under its own adapter; `base` is without any."""
    layout = joint.layout
    places = rows.cached(layout, x, lambda: _places(layout, rows, x)) if layout.names else None
    if places is None or places.is_bare:
        return base(x)
    if joint.inputs is not None:
        x = x * joint.inputs[places.own].view_as(x)
    x_TI, y = x.reshape(-1, x.shape[-1]), base(x)
    # Of a new tensor, which what follows is added to in place, or a slice of one that nobody else reads.
    y_TO = y.reshape(-1, y.shape[-1])
    if joint.low_rank is not None:
        y_TO = _added(y_TO, x_TI, joint.low_rank, layout.low_rank, places.low_rank, places.groups)
    if joint.outputs is not None:
        y_TO.mul_(joint.outputs[places.own])
    for factors, ranks, others in zip(joint.bottlenecks, layout.bottlenecks, places.bottlenecks, strict=True):
        y_TO = _added(y_TO, y_TO, factors, ranks, others, places.groups)
    if joint.biases is not None:
        y_TO.add_(joint.biases[places.own])
    return y_TO.view(*x.shape[:-1], -1)


def _change(module: Any, name: str) -> RowParts | None:
    """What an adapter does to each row of a layer; None where it does nothing there, or has no such form."""
    own: Any = deltas_of(module)
    # What is held whole replaces parameters of the layer, so that the frozen product isn't a part of it.
    if name not in own or own[name].holds:
        return None
    return own[name].row_parts(Frozen(module, module.adopted_base, frozen_forward(module)))


def _together(changes: Mapping[str, list[RowParts | None]], modules: Sequence[Any]) -> dict[str, RowParts] | None:
    """Changes of several layers as those of one with all of their outputs; None where they can't be."""
    if len(modules) == 1:
        return {name: own for name, (own,) in changes.items() if own is not None}
    parts = [each for own in changes.values() for each in own if each is not None]
    if any(each.input is not None or each.bottleneck is not None for each in parts):
        # The one scales what all layers read, the other reads what a single one gives.
        return None
    widths = [module.out_features for module in modules]
    return {name: _beside_each_other(own, widths) for name, own in changes.items()}


def _beside_each_other(own: Sequence[RowParts | None], widths: Sequence[int]) -> RowParts:
    """One adapter's changes of several layers: A stacked, each B in the rows of its own outputs."""

    def vectors(name: str, neutral: float) -> Tensor | None:
        found = [getattr(each, name, None) for each in own]
        like = next((vector for vector in found if vector is not None), None)
        if like is None:
            return None
        filled = (like.new_full((n,), neutral) if v is None else v for v, n in zip(found, widths, strict=True))
        return torch.cat([*filled])

    pairs = [(each.a, each.b) for each in own if each is not None and each.a is not None and each.b is not None]
    a = b = None
    if pairs:
        a = torch.cat([a for a, _ in pairs])
        # (outputs of all, ranks of all), zero but for each layer's own block.
        blocks = [a.new_zeros(n, 0) if e is None or e.b is None else e.b for e, n in zip(own, widths, strict=True)]
        b = torch.block_diag(*blocks)
    return RowParts(a=a, b=b, output=vectors("output", 1.0), bias=vectors("bias", 0.0))


def _rank(parts: RowParts) -> int:
    """How many ranks it has in all factors."""
    return sum(len(each) for each in (parts.a, parts.bottleneck and parts.bottleneck.down) if each is not None)


def _low_rank(parts: Mapping[str, RowParts], dtype: torch.dtype) -> tuple[Ranks, Factors | None]:
    pairs = {name: (each.a, each.b) for name, each in parts.items() if each.a is not None and each.b is not None}
    if not pairs:
        return {}, None
    factors = Factors(
        held(_stacked((a for a, _ in pairs.values()), dtype)), held(_stacked((b for _, b in pairs.values()), dtype, 1))
    )
    return {name: len(a) for name, (a, _) in pairs.items()}, factors


def _bottlenecks(parts: Mapping[str, RowParts], dtype: torch.dtype) -> list[tuple[Ranks, Factors]]:
    """One for each activation that there is."""
    known = {name: each.bottleneck for name, each in parts.items() if each.bottleneck is not None}
    done = []
    for activation in dict.fromkeys(each.activation for each in known.values()):
        alike = {name: each for name, each in known.items() if each.activation is activation}
        factors = Factors(
            a=held(_stacked((each.down for each in alike.values()), dtype)),
            b=held(_stacked((each.up for each in alike.values()), dtype, 1)),
            bias=_stacked((each.down_bias for each in alike.values()), dtype),
            activation=activation,
        )
        done.append(({name: len(each.down) for name, each in alike.items()}, factors))
    return done


def _stacked(tensors: Iterable[Tensor], dtype: torch.dtype, dim: int = 0) -> Tensor:
    return torch.cat([each.to(dtype) for each in tensors], dim)


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
