"""The factors of several adapters side by side, at one linear layer or at several that read one tensor.

An adapter that comes is put behind those that are there, which are copied in one piece and not looked at again, and one
that goes is cut out: a server whose clients ask for another adapter with each request does this all the time. Factors
that stay for some steps are put into oneDNN's blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.adapters.adopt import frozen_forward
from slimtune.core.delta import RowParts
from slimtune.core.frozen import Frozen, deltas_of
from slimtune.ops.reordered_linear import held, linear, written_out

Ranks = Mapping[str, int]
"""How many ranks each adapter has in some factors, in the order in which they lie there."""
Pair = tuple[Tensor, Tensor, Tensor | None]
"""A (r, in), B (out, r) and a bias (r,), of one adapter."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Which adapters a layer has at hand, in their order, and their ranks in its low-rank pairs and its bottlenecks.

    One object for all layers alike: what follows from it and from the rows is made once a step, and found by the
    object. Comparing names would take longer than a small product.
    """

    names: tuple[str, ...] = ()
    low_rank: Ranks = field(default_factory=dict)
    bottlenecks: tuple[Ranks, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        """Its value. Ranks are a part of it: an adapter's next version may have others."""
        return self.names, *(tuple(ranks.items()) for ranks in (self.low_rank, *self.bottlenecks))

    def rank(self, name: str) -> int:
        """The ranks that an adapter has in all factors."""
        return sum(ranks.get(name, 0) for ranks in (self.low_rank, *self.bottlenecks))


_SETTLED, _SPREAD = 16, 16
"""Steps after which factors are put into blocks, and over how many steps those of all layers are spread."""
_places = itertools.count()


@dataclass(eq=False)
class Factors:
    """The pairs of several adapters behind each other: f(h A^T + bias) B^T.

    At first A and B lie as their products read them best that are not in oneDNN's blocks, the ranks side by side; a
    batch that stays as it is for some steps has them in blocks, whose products are quicker by a tenth of a step. Blocks
    can't be joined with those of an adapter that comes, and making them takes as long as several such steps.

    Attributes:
        a, b: (R, in) and (out, R).
        bias: (R,), or None.
        activation: f, of a bottleneck, whose h is the layer's output; None for a low-rank pair, which reads its input.
        steps_left: until they are put into blocks; of parts, which are none of a layer's, never.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    activation: Callable[[Tensor], Tensor] | None = None
    steps_left: int = 0

    def inner(self, h: Tensor) -> Tensor:
        """f(h A^T + bias), (tokens, R), as a new tensor."""
        self.steps_left -= 1
        if self.steps_left == 0:
            self.a, self.b = held(self.a), held(self.b)
        z_TR = linear(h, self.a, self.bias)
        return z_TR if self.activation is None else self.activation(z_TR)

    def parts(self, runs: Iterable[slice]) -> list[Factors]:
        """Those of some stretches of ranks."""
        a_RI, b_OR = written_out(self.a), written_out(self.b)
        biases = ((run, None if self.bias is None else self.bias[run]) for run in runs)
        return [Factors(a_RI[run], b_OR[:, run], bias, self.activation) for run, bias in biases]

    def each(self, ranks: Ranks) -> Iterator[tuple[str, Factors]]:
        """Those of each adapter."""
        ends = list(itertools.accumulate(ranks.values(), initial=0))
        return zip(ranks, self.parts(itertools.starmap(slice, itertools.pairwise(ends))), strict=True)


@dataclass(frozen=True)
class Table:
    """A vector for each adapter.

    Attributes:
        rows: (adapters + 1, width), the last one neutral, for rows of none.
        owners: the adapters whose own isn't neutral.
    """

    rows: Tensor
    owners: frozenset[str]


@dataclass(frozen=True)
class JointFactors:
    """What several adapters change at one layer, or at several that read one tensor, in its dtype.

    Attributes:
        seen: the adapters that were looked at; some may have no form of this kind.
        present: those that have, by layer.
        is_joint: whether the layers can have one product, so that what follows is of use.
        recent: the adapters in what follows, those of the last batch that brought another one first.
        layout: the same in the order in which they lie.
        low_rank, bottlenecks: their pairs, a bottleneck's by the activation.
        inputs, outputs, biases: i, o and p of the formula; None where all are neutral.
    """

    seen: frozenset[str]
    present: Mapping[nn.Module, frozenset[str]]
    is_joint: bool = True
    recent: tuple[str, ...] = ()
    layout: Layout = field(default_factory=Layout)
    low_rank: Factors | None = None
    bottlenecks: tuple[Factors, ...] = ()
    inputs: Table | None = None
    outputs: Table | None = None
    biases: Table | None = None


def join(
    known: JointFactors | None, modules: Sequence[Any], wanted: Sequence[str], rank_budget: int, dtype: torch.dtype
) -> JointFactors:
    """The factors with those of all wanted adapters, and of the others in `known` as far as the budget reaches.

    Args:
        modules: the layer, or those that read one tensor.
        rank_budget: the sum of ranks up to which adapters that aren't wanted are kept.
    """
    if known is None or not known.is_joint:
        known = JointFactors(frozenset(), dict.fromkeys(modules, frozenset()))
    of_new = {name: [_change(m, name) for m in modules] for name in wanted if name not in known.seen}
    of_new = {name: own for name, own in of_new.items() if any(own)}
    new = {name: _as_one(own, modules) for name, own in of_new.items()}
    there = {name for module in modules for name in deltas_of(module)}
    kept = [name for name in known.recent if name in wanted]
    # Adapters come and go by the step: without those that left, two clients in turn would have all factors joined
    # anew each time.
    ranks = sum(map(known.layout.rank, kept)) + sum(_rank(each) for own in of_new.values() for each in own if each)
    for name in (name for name in known.recent if name not in wanted and name in there):
        if ranks + known.layout.rank(name) <= rank_budget:
            kept.append(name)
            ranks += known.layout.rank(name)
    seen = frozenset(wanted).union(kept)
    present = {
        module: (known.present[module] & seen) | {name for name, own in of_new.items() if own[place] is not None}
        for place, module in enumerate(modules)
    }
    parts = {name: each for name, each in new.items() if each is not None}
    if len(parts) < len(new):
        return JointFactors(seen, present, is_joint=False)
    recent = (*(name for name in wanted if name in kept or name in new), *(name for name in kept if name not in wanted))
    return _changed(known, seen, present, recent, parts, dtype)


def without(known: JointFactors, name: str) -> JointFactors | None:
    """The factors as if an adapter had never been there; None where they are made anew rather than changed."""
    if name not in known.seen:
        return known
    if not known.is_joint:
        return None
    rest = tuple(each for each in known.recent if each != name)
    present = {module: names - {name} for module, names in known.present.items()}
    return _changed(known, known.seen - {name}, present, rest, {}, torch.float32)


def _changed(
    known: JointFactors, seen: frozenset[str], present: Mapping[nn.Module, frozenset[str]], recent: tuple[str, ...],
    new: Mapping[str, RowParts], dtype: torch.dtype,
) -> JointFactors:  # fmt: skip
    """`known` with the new adapters and without those that aren't recent."""
    names = tuple(name for name in known.layout.names if name in recent)

    def table(before: Table | None, part: str, neutral: float) -> Table | None:
        of_new = {name: getattr(each, part) for name, each in new.items()}
        return _table(before, known.layout.names, names, of_new, neutral, dtype)

    pairs = {n: (each.a, each.b, None) for n, each in new.items() if each.a is not None and each.b is not None}
    ranks, low_rank = _behind(known.low_rank, known.layout.low_rank, names, pairs, dtype)
    bottlenecks = _bottlenecks(known, names, new, dtype)
    return JointFactors(
        seen=seen,
        present=present,
        recent=recent,
        layout=Layout((*names, *new), ranks, tuple(each for each, _ in bottlenecks)),
        low_rank=low_rank,
        bottlenecks=tuple(factors for _, factors in bottlenecks),
        inputs=table(known.inputs, "input", 1.0),
        outputs=table(known.outputs, "output", 1.0),
        biases=table(known.biases, "bias", 0.0),
    )


def _behind(
    known: Factors | None, ranks: Ranks, names: Collection[str], new: Mapping[str, Pair], dtype: torch.dtype,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Ranks, Factors | None]:  # fmt: skip
    """Of the factors that were there those of some adapters, and behind them the new ones."""
    after = {n: rank for n, rank in ranks.items() if n in names} | {n: len(a) for n, (a, _, _) in new.items()}
    if not new and len(after) == len(ranks):
        return ranks, known
    if not after:
        return {}, None
    pieces = [] if known is None else known.parts(_runs(ranks, names))
    pieces += [
        Factors(a.to(dtype), b.to(dtype), None if bias is None else bias.to(dtype)) for a, b, bias in new.values()
    ]
    biases = [each.bias for each in pieces if each.bias is not None]
    # Joined transposed, so that ranks lie side by side.
    return after, Factors(
        a=torch.cat([each.a.t() for each in pieces], 1).t(),
        b=torch.cat([each.b.t() for each in pieces]).t(),
        bias=torch.cat(biases) if biases else None,
        activation=activation,
        steps_left=_SETTLED + next(_places) % _SPREAD,
    )


def _bottlenecks(
    known: JointFactors, names: Collection[str], new: Mapping[str, RowParts], dtype: torch.dtype
) -> list[tuple[Ranks, Factors]]:
    """One for each activation that there is."""
    before = {f.activation: (f, ranks) for f, ranks in zip(known.bottlenecks, known.layout.bottlenecks, strict=True)}
    of_new = {name: each.bottleneck for name, each in new.items() if each.bottleneck is not None}
    done = []
    for activation in dict.fromkeys([*before, *(each.activation for each in of_new.values())]):
        factors, ranks = before.get(activation, (None, {}))
        alike = {
            name: (each.down, each.up, each.down_bias) for name, each in of_new.items() if each.activation is activation
        }
        after, factors = _behind(factors, ranks, names, alike, dtype, activation)
        if factors is not None:
            done.append((after, factors))
    return done


def _table(
    known: Table | None, before: Sequence[str], names: Collection[str], new: Mapping[str, Tensor | None],
    neutral: float, dtype: torch.dtype,
) -> Table | None:  # fmt: skip
    """Of the vectors that were there those of some adapters, behind them the new ones, and a neutral one."""
    owners = frozenset(name for name in (known.owners if known else ()) if name in names)
    own = {name: vector for name, vector in new.items() if vector is not None}
    if not owners and not own:
        return None
    if known is not None and not new and len(names) == len(before):
        return known
    like = next(iter(own.values())).to(dtype) if known is None else known.rows[-1]
    none = torch.full_like(like, neutral)[None]
    if known is None:
        pieces = [none.expand(len(names), -1)]
    else:
        pieces = [known.rows[run] for run in _runs(dict.fromkeys(before, 1), names)]
    pieces += [none if vector is None else vector.to(dtype)[None] for vector in new.values()]
    return Table(torch.cat([*pieces, none]), owners | own.keys())


def _runs(sizes: Mapping[str, int], names: Collection[str]) -> Iterator[slice]:
    """Where those of some names lie, of tensors of these sizes that lie behind each other; neighbours as one."""
    begin = end = 0
    for name, size in sizes.items():
        if name in names:
            end += size
        else:
            if end > begin:
                yield slice(begin, end)
            begin = end = end + size
    if end > begin:
        yield slice(begin, end)


def _change(module: Any, name: str) -> RowParts | None:
    """What an adapter does to each row of a layer; None where it does nothing there, or has no such form."""
    own: Any = deltas_of(module)
    # What is held whole replaces parameters of the layer, so that the frozen product isn't a part of it.
    if name not in own or own[name].holds:
        return None
    return own[name].row_parts(Frozen(module, module.adopted_base, frozen_forward(module)))


def _as_one(own: Sequence[RowParts | None], modules: Sequence[Any]) -> RowParts | None:
    """An adapter's changes of several layers as that of one with all of their outputs; None where it can't be.

    A is stacked, and each B is in the rows of its own outputs.
    """
    if len(modules) == 1:
        return own[0]
    parts = [each for each in own if each is not None]
    if any(each.input is not None or each.bottleneck is not None for each in parts):
        # The one scales what all layers read, the other reads what a single one gives.
        return None
    widths = [module.out_features for module in modules]
    pairs = [(each.a, each.b) for each in parts if each.a is not None and each.b is not None]
    a = b = None
    if pairs:
        a = torch.cat([a for a, _ in pairs])
        # (outputs of all, ranks of all), zero but for each layer's own block.
        blocks = [a.new_zeros(n, 0) if e is None or e.b is None else e.b for e, n in zip(own, widths, strict=True)]
        b = torch.block_diag(*blocks)
    return RowParts(a=a, b=b, output=_ends(own, widths, "output", 1.0), bias=_ends(own, widths, "bias", 0.0))


def _ends(own: Sequence[RowParts | None], widths: Iterable[int], name: str, neutral: float) -> Tensor | None:
    """A vector of several layers' outputs, neutral where a layer has none; None where none has."""
    vectors = [getattr(each, name, None) for each in own]
    like = next((vector for vector in vectors if vector is not None), None)
    if like is None:
        return None
    return torch.cat([like.new_full((n,), neutral) if v is None else v for v, n in zip(vectors, widths, strict=True)])


def _rank(parts: RowParts) -> int:
    """How many ranks it has in all factors."""
    return sum(len(each) for each in (parts.a, parts.bottleneck and parts.bottleneck.down) if each is not None)
