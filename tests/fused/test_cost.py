"""What a fused layer costs beside its plain formula: products, what it keeps for the backward pass, second weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import slimtune
from slimtune.bases import base_of
from slimtune.core.frozen import Frozen
from slimtune.fused import vera
from tensors import randomize

FEATURES_IN, FEATURES_OUT = 64, 96
METHODS: dict[str, Any] = {
    "lora": slimtune.LoraConfig(r=4, target_modules=["0"]),
    "dora": slimtune.LoraConfig(r=4, target_modules=["0"], use_dora=True),
    "vera": slimtune.VeraConfig(r=4, target_modules=["0"], vera_dropout=0.0),
    "loha": slimtune.LoHaConfig(r=4, target_modules=["0"]),
}
each_method = pytest.mark.parametrize("method", METHODS)
# torch counts no product that is added to its output in place.
COUNTED = {torch.ops.aten.addmm_: lambda out, a, b, **options: 2 * a[0] * a[1] * b[1]}


def layer(method: str, bias: bool = True, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES_IN, FEATURES_OUT, bias))
    config = type(METHODS[method])(**METHODS[method].to_dict() | changes)
    return randomize(slimtune, slimtune.get_peft_model(model, config)).train()


def plain(model: Any) -> Callable[[Tensor], Tensor]:
    """The layer by its formula."""
    site = model[0]
    frozen = Frozen(site, base_of(site), site.adopted_from.forward)
    return lambda x: site.deltas["default"](frozen, x)


def operations(call: Callable[[Tensor], Tensor], tokens: int) -> int:
    """Of a forward and its backward, two for a multiplication."""
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        call(torch.randn(tokens, FEATURES_IN, requires_grad=True)).sum().backward()
    return counter.get_total_flops()


class Made(TorchDispatchMode):
    """The tensors that are made, with memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {StorageWeakRef(leaf.untyped_storage()) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and (reference := StorageWeakRef(leaf.untyped_storage())) not in given:
                self.storages[reference] = leaf.untyped_storage().nbytes()
        return made

    @property
    def alive(self) -> int:
        """Bytes of those that are still held."""
        return sum(size for reference, size in self.storages.items() if not reference.expired())


@each_method
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [16, 400])
def test_a_fused_layer_repeats_no_product_of_the_base(method: str, tokens: int, bias: bool) -> None:
    model = layer(method, bias)
    base = 2 * tokens * FEATURES_IN * FEATURES_OUT
    assert operations(model, tokens) < operations(plain(model), tokens) + base / 2


@pytest.mark.parametrize(("method", "options"), [("lora", {"lora_dropout": 0.3}), ("dora", {}), ("vera", {})])
def test_a_fused_layer_keeps_less_for_the_backward_pass(method: str, options: dict[str, Any]) -> None:
    model = layer(method, **options)
    x = torch.randn(400, FEATURES_IN, requires_grad=True)
    kept = []
    for call in (model, plain(model)):
        with Made() as made:
            y = call(x)
        kept.append(made.alive)
        del y
    assert kept[0] < kept[1]


@pytest.mark.parametrize("tokens", [1, 50, 100, 150, 400])
def test_vera_sums_its_weights_where_that_multiplies_less_often(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = layer("vera", r=32)
    chosen, ways = operations(model, tokens), []
    for is_summed in (False, True):
        monkeypatch.setattr(vera, "_sum_is_cheaper", lambda delta, x, is_summed=is_summed: is_summed)
        ways.append(operations(model, tokens))
    assert chosen == min(ways)
    assert ways[0] != ways[1]


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_a_backward_of_few_tokens_makes_no_second_weight(method: str) -> None:
    y = layer(method)(torch.randn(8, FEATURES_IN, requires_grad=True))
    with Made() as made:
        y.backward(torch.ones_like(y))
    assert 0 < max(made.storages.values()) < 4 * FEATURES_IN * FEATURES_OUT
