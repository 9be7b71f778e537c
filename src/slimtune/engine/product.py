"""Linear layers under the adapters of many rows at once, whatever their methods.

    h = o * (base(i * x) + ((i * x) A^T * M) B),   y = h + (f(h D^T + d) * N) U + p

A and B are the factors of all low-rank adapters in the batch, side by side, D and U those of all bottlenecks; M and N
leave each row its own adapter's ranks; i, o and p are looked up by row. The frozen product is the layer's own, so that
bases in few bits need nothing of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from slimtune.adapters.rows import RowAdapters, check_rows
from slimtune.core.delta import RowParts
from slimtune.core.frozen import Frozen, deltas_of
from slimtune.ops.reordered_linear import add_linear, held, linear, written_out

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
    """

    own: Tensor
    low_rank: Tensor | None
    bottlenecks: tuple[Tensor | None, ...]
    groups: Mapping[str, Tensor]


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
    """What several adapters change at one layer, in the dtype of its inputs.

    Attributes:
        seen: the adapters that were looked at; some may have no form of this kind.
        layout: the others.
        low_rank, bottlenecks: their pairs, a bottleneck's by the activation.
        inputs, outputs, biases: tables of i, o and p, a row for each adapter and a neutral one at the end; None where
            all are neutral.
    """

    seen: frozenset[str]
    layout: Layout
    low_rank: Factors | None
    bottlenecks: tuple[Factors, ...]
    inputs: Tensor | None
    outputs: Tensor | None
    biases: Tensor | None


class RowProduct:
    """The products of all layers of one model, with the factors of the adapters that were in use lately.

    Args:
        rank_budget: the sum of ranks up to which adapters that left the batch are kept beside those in it.
    """

    def __init__(self, rank_budget: int) -> None:
        self.rank_budget = rank_budget
        self._joint: dict[nn.Module, JointFactors] = {}
        # By layer, the adapters of the last batch, and those of them that run apart. Of that batch alone, whose steps
        # follow each other: kept for each batch that there was, they would fill the memory of a server.
        self._apart: dict[nn.Module, tuple[frozenset[str], frozenset[str]]] = {}
        # A layout goes with the last layer that has it.
        self._layouts: WeakValueDictionary[Any, Layout] = WeakValueDictionary()

    def forget(self, name: str | None = None) -> None:
        """Read an adapter anew, or all: it has gone, or may have been trained."""
        # What is joined without it stays: a server that lets adapters go to make room would join all anew each time.
        self._joint = {m: joint for m, joint in self._joint.items() if name is not None and name not in joint.seen}
        self._apart = {m: apart for m, apart in self._apart.items() if m in self._joint and name not in apart[0]}

    def __call__(
        self, module: Any, frozen: Callable[..., Any], rows: RowAdapters, x: Tensor
    ) -> tuple[Tensor, Collection[str]]:
        known, apart = self._apart.get(module, (None, frozenset()))
        if known != rows.distinct:
            # The first step of a batch of these adapters; those that follow find it known.
            check_rows(module, rows)
            own, joint = deltas_of(module), self._joint.get(module)
            present = [name for name in dict.fromkeys(rows.names) if name in own]
            if joint is None or not joint.seen.issuperset(present):
                joint = self._joint[module] = self._joined(module, frozen, present, joint, x.dtype)
            apart = frozenset(present).difference(joint.layout.names)
            self._apart[module] = rows.distinct, apart
        return self._product(module, frozen, self._joint[module], rows, x), apart

    def _joined(
        self, module: Any, frozen: Callable[..., Any], present: list[str], known: JointFactors | None, dtype: Any
    ) -> JointFactors:
        """The factors of the adapters in the batch, and of those that were, as far as the budget reaches."""
        base, own = Frozen(module, module.adopted_base, frozen), deltas_of(module)
        # Adapters come and go by the step: without those that left, two clients in turn would have all factors joined
        # anew each time.
        left = [name for name in (known.layout.names if known else ()) if name in own and name not in present]
        parts: dict[str, RowParts] = {}
        for name in (*present, *left):
            # What is held whole replaces parameters of the layer, so that the frozen product isn't a part of it.
            change = None if own[name].holds else own[name].row_parts(base)
            if change is None:
                continue
            if name in present or sum(map(_rank, (*parts.values(), change))) <= self.rank_budget:
                parts[name] = change
        return self._side_by_side(frozenset(present) | parts.keys(), parts, dtype)

    def _side_by_side(self, seen: frozenset[str], parts: Mapping[str, RowParts], dtype: torch.dtype) -> JointFactors:
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
            layout=self._layouts.setdefault(key, layout),
            low_rank=low_rank,
            bottlenecks=tuple(factors for _, factors in bottlenecks),
            inputs=table("input", 1.0),
            outputs=table("output", 1.0),
            biases=table("bias", 0.0),
        )

    def _product(
        self, module: Any, frozen: Callable[..., Any], joint: JointFactors, rows: RowAdapters, x: Tensor
    ) -> Tensor:
        layout = joint.layout
        if not layout.names:
            return frozen(module, x)
        x_TI = x.reshape(-1, x.shape[-1])
        places = rows.cached(layout, x, lambda: _places(layout, rows, x))
        if joint.inputs is not None:
            x_TI = x_TI * joint.inputs[places.own]
        # A new tensor, which what follows is added to in place.
        y_TO = frozen(module, x_TI)
        if joint.low_rank is not None:
            y_TO = _added(y_TO, x_TI, joint.low_rank, layout.low_rank, places.low_rank, places.groups)
        if joint.outputs is not None:
            y_TO.mul_(joint.outputs[places.own])
        for factors, ranks, others in zip(joint.bottlenecks, layout.bottlenecks, places.bottlenecks, strict=True):
            y_TO = _added(y_TO, y_TO, factors, ranks, others, places.groups)
        if joint.biases is not None:
            y_TO.add_(joint.biases[places.own])
        return y_TO.view(*x.shape[:-1], -1)


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

    return RowPlaces(index_T, others(layout.low_rank), tuple(map(others, layout.bottlenecks)), groups)


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
