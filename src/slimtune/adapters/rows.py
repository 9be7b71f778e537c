"""Rows of one batch under adapters of their own: the frozen product is computed once, for all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from slimtune.core.frozen import Base, Frozen, deltas_of
from slimtune.errors import ConfigError

BASE = "__base__"
"""The name under which rows of a mixed batch ask for the untouched base."""


class JointProduct(Protocol):
    """The product of a linear layer under several adapters at once."""

    def __call__(
        self, module: Any, frozen: Callable[..., Any], rows: RowAdapters, x: Tensor
    ) -> tuple[Tensor, Collection[str]]:
        """What it computes, and the adapters that run apart, whose rows are the frozen product's in it.

        Raises:
            ConfigError: as `check_rows`.
        """
        ...


class RowAdapters:
    """The adapter of each row of a batch.

    Attributes:
        names: one for each row.
        distinct: the same, each once.
        kept: the rows whose logits are computed, ascending; None for all.
        packed: the rows are the tokens of one packed batch row, (1, rows, ...), or (rows, ...) where a module takes
            its tokens so.
        product: what computes several adapters at once, where there is one.
    """

    def __init__(
        self, names: tuple[str, ...], kept: tuple[int, ...] | None = None, packed: bool = False,
        product: JointProduct | None = None,
    ) -> None:  # fmt: skip
        self.names, self.distinct, self.kept, self.packed = names, frozenset(names), kept, packed
        self.product = product
        self._groups: dict[tuple[int, torch.device], dict[str, Tensor]] = {}
        self._made: dict[Hashable, Any] = {}

    def dim(self, x: Tensor) -> int:
        """The axis of a module's input along which rows lie."""
        # Two lengths: all tokens of the step inside of the layers, the kept ones alone at the head.
        counts = (len(self.names), len(self.kept or ()))
        return 1 if self.packed and x.ndim > 1 and x.shape[0] == 1 and x.shape[1] in counts else 0

    def groups(self, x: Tensor) -> dict[str, Tensor]:
        """The positions in `x` of each adapter's rows. Raises: ConfigError, for a batch of another length."""
        length = x.shape[self.dim(x)]
        known = self._groups.get((length, x.device))
        if known is None:
            # Made once for all modules of a forward: a list of numbers becomes a tensor on the device.
            known = self._groups[length, x.device] = self._positions(length, x.device)
        return known

    def cached(self, key: Hashable, x: Tensor, make: Callable[[], Any]) -> Any:
        """What follows from the rows alone, made once for all modules whose input is as long."""
        whole_key = key, x.shape[self.dim(x)], x.device
        if whole_key not in self._made:
            self._made[whole_key] = make()
        return self._made[whole_key]

    def _positions(self, length: int, device: torch.device) -> dict[str, Tensor]:
        names = self.names
        if self.kept is not None and length == len(self.kept):
            names = tuple(names[row] for row in self.kept)
        if length % len(names):
            raise ConfigError(
                f"adapter_names has {len(names)} names for a batch of {length} rows; give one for each row"
            )
        # Beams and returned sequences repeat each row in place.
        names = [name for name in names for _ in range(length // len(names))]
        return {
            name: torch.tensor([i for i, other in enumerate(names) if other == name], device=device)
            for name in dict.fromkeys(names)
        }


class KnownProduct(Frozen):
    """A frozen module of which one product is known: asked for that of this very input, it computes nothing."""

    __slots__ = ("x", "y")

    def __init__(self, module: Any, base: Base, call: Callable[..., Any], x: Tensor, y: Tensor) -> None:
        super().__init__(module, base, call)
        self.x, self.y = x, y

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.y if args and args[0] is self.x else super().__call__(*args, **kwargs)


def check_rows(module: Any, rows: RowAdapters) -> None:
    """Raises: ConfigError, for an adapter that changes parameters of the module, which all rows share."""
    own = deltas_of(module)
    for name in rows.distinct:
        if name in own and own[name].reweighs:
            raise ConfigError(
                f"the adapter '{name}' changes parameters that all rows of a batch share and can't be mixed "
                "with others in one batch; run its rows as a batch of their own"
            )


def run_rows(
    module: Any,
    frozen: Callable[..., Any],
    composed: Callable[[str], Callable[..., Any]],
    rows: RowAdapters,
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What the module computes with each row of x under its own adapter.

    Args:
        frozen: what it computes without any, as a function of the module and its inputs.
        composed: the same under the adapter of this name.
    """
    own, apart = deltas_of(module), rows.distinct
    if rows.product is not None and not (args or kwargs) and module.adopted_base.kind == "linear":
        # First: a token that is decoded passes here once a layer, and mostly no adapter runs apart.
        y, apart = rows.product(module, frozen, rows, x)
        if not apart:
            return y
    elif own.keys().isdisjoint(rows.distinct):
        # No adapter of this batch is here: the plain product, without an index or a copy.
        return frozen(module, x, *args, **kwargs)
    else:
        check_rows(module, rows)
        if len(rows.groups(x)) == 1:
            return composed(next(iter(rows.groups(x))))(module, x, *args, **kwargs)
        y = frozen(module, x, *args, **kwargs)
    groups, dim = rows.groups(x), rows.dim(x)
    apart = own.keys() & apart & groups.keys()
    if not apart:
        return y
    parts, order = [], []
    for name, positions in groups.items():
        y_rows = y.index_select(dim, positions)
        if name in apart:
            x_rows = x.index_select(dim, positions)
            if own[name].holds:
                # Its own parameters stand in for the module's, so that the frozen product isn't a part of it.
                y_rows = composed(name)(module, x_rows, *args, **kwargs)
            else:
                base = KnownProduct(module, module.adopted_base, frozen, x_rows, y_rows)
                y_rows = own[name](base, x_rows, *args, **kwargs)
        parts.append(y_rows)
        order.append(positions)
    # Rows were taken out by adapter; argsort of where they came from is where they go back to.
    return torch.cat(parts, dim).index_select(dim, torch.cat(order).argsort())
