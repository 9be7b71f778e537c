"""Rows under adapters of their own: each is what its adapter alone computes, in whatever order they stand."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor

import slimtune
from kinds import KINDS, Kind, attach, configs, methods_for
from slimtune.adapters.rows import BASE, RowAdapters
from tensors import assert_near, randomize

ADAPTERS = "abc"


@st.composite
def hosts(draw: st.DrawFn) -> tuple[Kind, Any]:
    """A module of any kind under three adapters of any methods, with random numbers in them."""
    kind: Kind = draw(st.sampled_from(KINDS))
    drawn = [draw(configs(draw(st.sampled_from(methods_for(kind))), kind)) for _ in ADAPTERS]
    host = attach(kind, drawn[0], "a")
    for name, config in zip("bc", drawn[1:], strict=True):
        host.add_adapter(name, config)
    for seed, name in enumerate(ADAPTERS):
        randomize(slimtune, host, name, seed)
    return kind, host.eval()


@torch.no_grad()
def by_rows(host: Any, x: Tensor, names: list[str]) -> Tensor:
    with host.adapter_state.using(applied=(), rows=RowAdapters(tuple(names))):
        return host(x)


@torch.no_grad()
def alone(host: Any, x: Tensor, name: str) -> Tensor:
    with host.adapter_state.using(applied=() if name == BASE else (name,)):
        return host(x)


@settings(max_examples=80)
@given(drawn=hosts(), data=st.data())
def test_each_row_is_its_adapter_alone_in_any_order(drawn: tuple[Kind, Any], data: st.DataObject) -> None:
    kind, host = drawn
    # What changes parameters of the module is refused in a mixed batch, which other tests hold.
    mixing = [name for name in ADAPTERS if not (name in host.site.deltas and host.site.deltas[name].reweighs)]
    x = torch.cat([kind.input(seed) for seed in (1, 2, 3)])
    names = data.draw(st.lists(st.sampled_from([BASE, *mixing]), min_size=len(x), max_size=len(x)))
    order = data.draw(st.permutations(range(len(x))))

    y = by_rows(host, x, names)
    assert_near(by_rows(host, x[list(order)], [names[row] for row in order]), y[list(order)])
    for row, name in enumerate(names):
        assert_near(y[row : row + 1], alone(host, x[row : row + 1], name), 2e-5, f"row {row} under {name}")
