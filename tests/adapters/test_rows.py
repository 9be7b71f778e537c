"""Rows under adapters of their own: each is what its adapter alone computes, in whatever order they stand."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import slimtune
from kinds import KINDS, Kind, attach, configs, methods_for
from slimtune.adapters.rows import BASE, RowAdapters
from slimtune.errors import ConfigError
from tensors import assert_near, predict, randomize
from zoo import QWEN2

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


BATCHES: dict[str, tuple[Any, Any, Any]] = {
    "DoRA and biases": (
        slimtune.LoraConfig(r=4, use_dora=True, bias="all"),
        slimtune.LoraConfig(r=2, use_dora=True, bias="lora_only"),
        slimtune.LoraConfig(r=2, lora_bias=True),
    ),
    "biases alone": (slimtune.BitFitConfig(), slimtune.LoraConfig(r=2, bias="all"), slimtune.IA3Config()),
    "what is trained whole": (
        slimtune.LoraConfig(r=2, modules_to_save=["lm_head"]),
        slimtune.LoraConfig(r=2, trainable_token_indices=[5, 6]),
        slimtune.LNTuningConfig(),
    ),
    "what adds to the loss alone": (
        slimtune.AdaLoraConfig(target_r=2, init_r=4, total_step=10),
        slimtune.AdaLoraConfig(target_r=1, init_r=2, total_step=10),
        slimtune.LoKrConfig(r=2),
    ),
}


def tuned(*configs: Any) -> Any:
    """A model with biases under the adapters a, b, ..., the first active."""
    model: Any = slimtune.get_peft_model(QWEN2.model(), configs[0], "a")
    for name, config in zip("bcd", configs[1:], strict=False):
        model.add_adapter(name, config)
    for seed, name in enumerate(list(model.peft_config)):
        randomize(slimtune, model, name, seed)
    return model.eval()


@pytest.mark.parametrize("kind", BATCHES)
def test_rows_of_a_whole_model(kind: str) -> None:
    model, names = tuned(*BATCHES[kind]), ["c", BASE, "a", "b"]
    batch = {"input_ids": torch.randint(4, 100, (4, 7), generator=torch.Generator().manual_seed(0))}
    mixed = predict(model, batch, adapter_names=names)
    base = predict(QWEN2.model(), batch)
    for row, name in enumerate(names):
        if name != BASE:
            model.set_adapter(name)
        expected = base if name == BASE else predict(model, batch)
        assert_near(mixed[row : row + 1], expected[row : row + 1], 1e-5, f"row {row} under {name}")
        assert name == BASE or not torch.equal(mixed[row], base[row])


AROUND_THE_MODEL = {
    "prompt": slimtune.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "prefix": slimtune.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", AROUND_THE_MODEL)
def test_the_active_adapter_has_no_part_in_rows_of_others(kind: str) -> None:
    model = tuned(AROUND_THE_MODEL[kind], slimtune.LoraConfig(r=2))
    batch = QWEN2.batch()
    model.set_adapter("b")
    expected, tokens = predict(model, batch), model.generate(input_ids=batch["input_ids"], max_new_tokens=3)
    model.set_adapter("a")
    assert_near(predict(model, batch, adapter_names=["b", "b"]), expected)
    assert_near(predict(model, batch, adapter_names=[BASE, BASE]), predict(QWEN2.model(), batch))
    written = model.generate(input_ids=batch["input_ids"], adapter_names=["b", "b"], max_new_tokens=3)
    assert torch.equal(written, tokens)
    with pytest.raises(ConfigError, match="the adapter 'a' changes the whole model and can't be mixed"):
        model(**batch, adapter_names=["a", "b"])


def test_rows_inside_of_disable_adapter_are_the_base_s_whatever_they_name() -> None:
    model, batch = tuned(*BATCHES["DoRA and biases"]), QWEN2.batch()
    base = predict(QWEN2.model(), batch)
    with model.disable_adapter():
        assert torch.equal(predict(model, batch, adapter_names=["a", "b"]), base)
        with pytest.raises(ConfigError, match="has 3 names for a batch of 2 rows"):
            model(**batch, adapter_names=["a", "b", "c"])
    assert not torch.equal(predict(model, batch, adapter_names=["a", "b"]), base)
