"""The joint product of a layer: each row is what its adapter's own formula gives, whatever the method and the base."""

from __future__ import annotations

import itertools
from collections.abc import Sized
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import slimtune
from kinds import KINDS, Kind, attach, configs, methods_for
from slimtune.adapters.rows import BASE, RowAdapters
from slimtune.engine import factors, product
from slimtune.engine.product import RowProduct
from tensors import assert_near, randomize

LINEAR = tuple(kind for kind in KINDS if kind.example().shape[-1] == 12 and "norm" not in kind.name)


@st.composite
def hosts(draw: st.DrawFn) -> Any:
    """A linear layer under three adapters of any methods, with random numbers in them."""
    kind: Kind = draw(st.sampled_from(LINEAR))
    drawn = [draw(configs(draw(st.sampled_from(methods_for(kind))), kind)) for _ in range(3)]
    host = attach(kind, drawn[0], "a")
    for name, config in zip("bc", drawn[1:], strict=True):
        host.add_adapter(name, config)
    for seed, name in enumerate("abc"):
        randomize(slimtune, host, name, seed)
    return host.eval()


@torch.no_grad()
def by_rows(host: Any, x: Tensor, names: list[str], joint: RowProduct) -> Tensor:
    rows = RowAdapters(tuple(names), packed=True, product=joint)
    with host.adapter_state.using(applied=(), rows=rows):
        return host(x)


@torch.no_grad()
def alone(host: Any, x: Tensor, names: list[str]) -> Tensor:
    outputs = torch.empty(0)
    for name in dict.fromkeys(names):
        with host.adapter_state.using(applied=() if name == BASE else (name,)):
            y = host(x)
        mine = torch.tensor([each == name for each in names])[None, :, None]
        outputs = torch.where(mine, y, outputs if outputs.numel() else y)
    return outputs


def may_mix(host: Any, names: list[str]) -> bool:
    return not any(host.site.deltas[name].reweighs for name in names if name in host.site.deltas)


@settings(max_examples=40)
@given(
    host=hosts(), seed=st.integers(0, 9), most=st.sampled_from([{}, product.MOST_WORK]),
    settled=st.sampled_from([1, 2, 100]),
)  # fmt: skip
def test_each_row_is_its_adapters_own_formula(host: Any, seed: int, most: dict[int, int], settled: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 9, 12, generator=generator)
    joint = RowProduct(rank_budget=8)
    # One after the other: adapters enter and leave the batch, and are kept as far as the budget reaches.
    for count in (1, 3, 2, 4):
        pool = [BASE, "a", "b", "c"]
        order = torch.randperm(4, generator=generator)[:count].tolist()
        names = [pool[order[i % count]] for i in range(9)]
        if not may_mix(host, names):
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(product, "MOST_WORK", most)
            # In blocks from the first step on, from the second, or never.
            patch.setattr(factors, "_SETTLED", settled)
            patch.setattr(factors, "_SPREAD", 1)
            for _ in range(3):
                assert_near(by_rows(host, x, names, joint), alone(host, x, names), 2e-5)
        # The next version of one of them, whether it was in the batch or not.
        changed = "abc"[order[0] % 3]
        randomize(slimtune, host, changed, seed + count)
        joint.forget(changed)


@pytest.mark.parametrize("most", [{}, product.MOST_WORK])
def test_what_one_adapter_makes_infinite_reaches_no_other_row(
    most: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "MOST_WORK", most)
    host = attach(LINEAR[0], slimtune.LoraConfig(r=2, target_modules=["site"]), "a")
    host.add_adapter("b", slimtune.LoraConfig(r=2, target_modules=["site"], use_dora=True))
    for name in "ab":
        randomize(slimtune, host, name)
    with torch.no_grad():
        host.site.deltas["a"].lora_A.fill_(3e38)
    x, names = torch.ones(1, 4, 12), ["a", "b", BASE, "b"]
    y = by_rows(host.eval(), x, names, RowProduct(8))
    assert not y[0, 0].isfinite().all()
    assert_near(y[:, 1:], alone(host, x, names)[:, 1:])


def test_what_is_kept_does_not_grow_with_the_batches_that_there_were() -> None:
    host = attach(LINEAR[0], slimtune.LoraConfig(r=2, target_modules=["site"]), "a")
    for name in "bcd":
        host.add_adapter(name, slimtune.LoraConfig(r=2, target_modules=["site"]))
    joint, x, kept = RowProduct(4), torch.ones(1, 4, 12), []
    batches = [list(names) for names in itertools.product("abcd", repeat=4)]
    for names in batches * 2:
        by_rows(host.eval(), x, names, joint)
        kept.append(sum(len(table) for table in vars(joint).values() if isinstance(table, Sized)))
    # One layer: its factors, its last batch, and the layout of the factors.
    assert max(kept) <= 3


def test_an_adapter_that_comes_or_goes_leaves_the_others_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    look = factors._change
    monkeypatch.setattr(factors, "_change", lambda module, name: read.append(name) or look(module, name))
    host = attach(LINEAR[0], slimtune.LoraConfig(r=2, target_modules=["site"]), "a")
    host.add_adapter("b", slimtune.LoraConfig(r=3, target_modules=["site"], use_dora=True))
    host.add_adapter("c", slimtune.BottleneckConfig(reduction_factor=4, target_modules=["site"]))
    for name in "abc":
        randomize(slimtune, host, name)
    joint, x = RowProduct(rank_budget=64), torch.randn(1, 4, 12)

    def answer(names: str) -> list[str]:
        """Which adapters were read for a batch whose rows are right."""
        read.clear()
        rows = [*names, *[BASE] * (4 - len(names))]
        assert_near(by_rows(host.eval(), x, rows, joint), alone(host, x, rows))
        return [*read]

    assert answer("ab") == ["a", "b"]
    assert answer("abc") == ["c"]
    assert answer("ca") == answer("b") == []
    joint.forget("a")
    assert answer("cb") == []
    assert answer("ba") == ["a"]


def test_forgetting_one_adapter_keeps_what_is_joined_without_it() -> None:
    host = attach(LINEAR[0], slimtune.LoraConfig(r=2, target_modules=["site"]), "a")
    host.add_adapter("b", slimtune.LoraConfig(r=2, target_modules=["site"]))
    joint, x, names = RowProduct(8), torch.ones(1, 2, 12), ["b", BASE]
    before = by_rows(host.eval(), x, names, joint)
    # As another version of each: `a` is nowhere in the batch, `b` is.
    for seed, name in enumerate("ab"):
        randomize(slimtune, host, name, seed)
    joint.forget("a")
    assert torch.equal(by_rows(host, x, names, joint), before)
    joint.forget("b")
    assert_near(by_rows(host, x, names, joint), alone(host, x, names))
    assert not torch.allclose(before, alone(host, x, names))
