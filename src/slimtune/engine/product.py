"""Linear layers under the adapters of many rows at once, whatever their methods.

    y = o * (base(i * x) + (z * M) B) + p,  z = (i * x) A,

A and B are the factors of all adapters in the batch, side by side; M leaves each row its own adapter's ranks; i, o and
p are looked up by row. The frozen product is the layer's own, so that bases in few bits need nothing of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.adapters.rows import RowAdapters, check_rows
from slimtune.core.delta import Frozen, RowParts, deltas_of

MOST_WORK = {2: 65_536, 4: 16_384}
"""Rows times ranks up to which one product for all adapters costs less than one for each on its own rows, by the bytes
of a number."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Which adapters are in the factors of a layer, in their order, with their ranks; one object for all layers alike.

    What follows from it and from the rows is made once a step, and found by the object: comparing names would take
    longer than a small product.
    """

    ranks: Mapping[str, int]


class RowPlaces(NamedTuple):
    """Where the rows of a batch are in the factors.

    Attributes:
        own: the place of each row's adapter in the tables, (rows,).
        others: where a rank is another adapter's than the row's, (rows, ranks); None where rows run by adapter.
    """

    own: Tensor
    others: Tensor | None


@dataclass(frozen=True)
class JointFactors:
    """What several adapters change at one layer, in the dtype of its inputs.

    Attributes:
        seen: the adapters that were looked at; some may have no form of this kind.
        layout: the others; their factors lie behind each other in A and B.
        a, b: A (R, in) and B (R, out) of all; None without any.
        inputs, outputs, biases: tables of i, o and p, a row for each adapter and a neutral one at the end; None where
            all are neutral.
    """

    seen: frozenset[str]
    layout: Layout
    a: Tensor | None
    b: Tensor | None
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
        self._layouts: WeakValueDictionary[tuple[tuple[str, int], ...], Layout] = WeakValueDictionary()

    def forget(self) -> None:
        """Read the adapters anew: one has gone, or may have been trained."""
        self._joint.clear()
        self._apart.clear()

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
            apart = frozenset(present) - joint.layout.ranks.keys()
            self._apart[module] = rows.distinct, apart
        return self._product(module, frozen, self._joint[module], rows, x), apart

    def _joined(
        self, module: Any, frozen: Callable[..., Any], present: list[str], known: JointFactors | None, dtype: Any
    ) -> JointFactors:
        """The factors of the adapters in the batch, and of those that were, as far as the budget reaches."""
        base, own = Frozen(module, module.adopted_base, frozen), deltas_of(module)
        # Adapters come and go by the step: without those that left, two clients in turn would have all factors joined
        # anew each time.
        left = [name for name in (known.layout.ranks if known else ()) if name in own and name not in present]
        parts: dict[str, RowParts] = {}
        for name in (*present, *left):
            # What is held whole replaces parameters of the layer, so that the frozen product isn't a part of it.
            change = None if own[name].holds else own[name].row_parts(base)
            if change is None:
                continue
            if name in present or sum(map(_rank, (*parts.values(), change))) <= self.rank_budget:
                parts[name] = change
        ranks = {name: _rank(each) for name, each in parts.items()}
        layout = self._layouts.setdefault(tuple(ranks.items()), Layout(ranks))
        return _side_by_side(frozenset(present) | parts.keys(), layout, parts, dtype)

    def _product(
        self, module: Any, frozen: Callable[..., Any], joint: JointFactors, rows: RowAdapters, x: Tensor
    ) -> Tensor:
        if not joint.layout.ranks:
            return frozen(module, x)
        x_TI = x.reshape(-1, x.shape[-1])
        places = rows.cached(joint.layout, x, lambda: _places(joint, rows, x))
        index_T = places.own
        if joint.inputs is not None:
            x_TI = x_TI * joint.inputs[index_T]
        # A new tensor, which what follows is added to in place.
        y_TO = frozen(module, x_TI)
        if joint.a is not None and joint.b is not None:
            if places.others is not None:
                # Written over and not multiplied by zero: what one adapter makes infinite must not reach other rows.
                z_TR = F.linear(x_TI, joint.a).masked_fill_(places.others, 0.0)
                y_TO.add_(z_TR @ joint.b)
            else:
                _add_by_adapter(y_TO, x_TI, joint, rows.groups(x))
        if joint.outputs is not None:
            y_TO.mul_(joint.outputs[index_T])
        if joint.biases is not None:
            y_TO.add_(joint.biases[index_T])
        return y_TO.view(*x.shape[:-1], -1)


def _rank(parts: RowParts) -> int:
    return 0 if parts.a is None else len(parts.a)


def _side_by_side(
    seen: frozenset[str], layout: Layout, parts: Mapping[str, RowParts], dtype: torch.dtype
) -> JointFactors:
    factors_a = [each.a for each in parts.values() if each.a is not None]
    factors_b = [each.b.t() for each in parts.values() if each.b is not None]

    def table(name: str, neutral: float) -> Tensor | None:
        vectors = [getattr(each, name) for each in parts.values()]
        like = next((vector for vector in vectors if vector is not None), None)
        if like is None:
            return None
        none = torch.full_like(like, neutral)
        return torch.stack([*(none if vector is None else vector for vector in vectors), none]).to(dtype)

    return JointFactors(
        seen=seen,
        layout=layout,
        a=torch.cat(factors_a).to(dtype) if factors_a else None,
        b=torch.cat(factors_b).to(dtype) if factors_b else None,
        inputs=table("input", 1.0),
        outputs=table("output", 1.0),
        biases=table("bias", 0.0),
    )


def _places(joint: JointFactors, rows: RowAdapters, x: Tensor) -> RowPlaces:
    ranks = joint.layout.ranks
    index_T = torch.full((x.shape[rows.dim(x)],), len(ranks), device=x.device)
    for place, name in enumerate(ranks):
        positions = rows.groups(x).get(name)
        if positions is not None:
            index_T[positions] = place
    if len(index_T) * sum(ranks.values()) > MOST_WORK.get(x.element_size(), 0):
        return RowPlaces(index_T, None)
    owners = [place for place, rank in enumerate(ranks.values()) for _ in range(rank)]
    return RowPlaces(index_T, index_T[:, None] != torch.tensor(owners, device=index_T.device))


def _add_by_adapter(y_TO: Tensor, x_TI: Tensor, joint: JointFactors, groups: Mapping[str, Tensor]) -> None:
    """Add each adapter's low-rank term to its own rows of y, in place."""
    assert joint.a is not None
    assert joint.b is not None
    begin = 0
    for name, rank in joint.layout.ranks.items():
        end = begin + rank
        if rank and name in groups:
            # Sum of ranks times rows is what the joint product costs; here each adapter meets its own rows alone.
            change = F.linear(x_TI[groups[name]], joint.a[begin:end]) @ joint.b[begin:end]
            y_TO.index_add_(0, groups[name], change.to(y_TO.dtype))
        begin = end
