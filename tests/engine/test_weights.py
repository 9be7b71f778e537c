"""The weights of a running engine: which layers multiply at once, and that nothing else comes of it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

import slimtune
from slimtune.adapters.rows import BASE, RowAdapters
from slimtune.engine.product import RowProduct
from slimtune.engine.weights import reordered_weights
from slimtune.ops.reordered_linear import LinearReordered, can_reorder
from small_seq2seq import t5
from tensors import assert_near, randomize
from zoo import GPT_NEOX, LLAMA, QWEN2, TIED_LLAMA, token_ids

pytestmark = pytest.mark.skipif(not can_reorder(nn.Linear(3, 2)), reason="torch has no oneDNN here")

ADAPTERS: dict[str, Any] = {
    "lora": slimtune.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]),
    "dora": slimtune.LoraConfig(r=2, target_modules=["k_proj", "up_proj"], use_dora=True),
    "all": slimtune.LoraConfig(r=4, target_modules="all-linear", lora_bias=True),
    "whole-keys": slimtune.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["k_proj"]),
    "ia3": slimtune.IA3Config(),
    "ia3-queries": slimtune.IA3Config(target_modules=["q_proj", "gate_proj"], feedforward_modules=["q_proj"]),
    "bottleneck": slimtune.BottleneckConfig(target_modules=["gate_proj"]),
    "loha": slimtune.LoHaConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]),
    "lokr": slimtune.LoKrConfig(r=2, target_modules=["k_proj", "gate_proj"]),
}


def shared_by(model: Any) -> set[tuple[str, ...]]:
    names = {module: name for name, module in model.named_modules()}
    found = [vars(m)["blocks"].shared for m in model.modules() if isinstance(m, LinearReordered)]
    return {tuple(names[m].rpartition(".")[2] for m in shared.modules) for shared in found if shared is not None}


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("specimen", "expected"),
    [
        (LLAMA, {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}),
        (QWEN2, {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}),
        (GPT_NEOX, set()),
    ],
    ids=["llama", "qwen2", "gpt-neox"],
)
def test_layers_that_read_one_tensor_multiply_it_at_once(specimen: Any, expected: set[tuple[str, ...]]) -> None:
    model, ids = specimen.model().eval(), token_ids(2, 7)
    before = logits_of(model, ids)
    with reordered_weights(model):
        assert shared_by(model) == expected
        assert_near(logits_of(model, ids), before, 1e-4)
        assert all(shared._known is None for shared in known_inputs(model)), "what was computed is kept for nobody"
    assert torch.equal(logits_of(model, ids), before)


def known_inputs(model: Any) -> list[Any]:
    found = [vars(m)["blocks"].shared for m in model.modules() if isinstance(m, LinearReordered)]
    return [shared for shared in found if shared is not None]


@pytest.mark.parametrize("seed", range(3))
def test_rows_under_any_adapters_are_as_with_the_plain_weights(seed: int) -> None:
    """Batch after batch: adapters on some layers of those that share an input, with and without parts by rows."""
    draw = random.Random(seed)
    names = draw.sample([*ADAPTERS], 6)
    model: Any = LLAMA.model()
    for index, name in enumerate(names):
        model = slimtune.get_peft_model(model, ADAPTERS[name], name) if not index else model
        if index:
            model.add_adapter(name, ADAPTERS[name])
        randomize(slimtune, model, name, index)
    model.eval()
    ids = token_ids(1, 6)
    batches = [[draw.choice([BASE, *draw.sample(names, 2)]) for _ in range(6)] for _ in range(6)]

    def all_logits(product: RowProduct) -> list[Tensor]:
        found = []
        for batch in batches:
            with model.adapter_state.using(applied=(), rows=RowAdapters(tuple(batch), packed=True, product=product)):
                found.append(logits_of(model, ids))
        return found

    plain = all_logits(RowProduct(12))
    with reordered_weights(model):
        for found, expected, batch in zip(all_logits(RowProduct(12)), plain, batches, strict=True):
            assert_near(found, expected, 1e-4, str(batch))


def test_a_model_that_needs_more_of_an_output_than_its_numbers_has_each_layer_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def flat(self: Any, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        # A slice of a wider tensor can't be viewed so.
        return self.down_proj((self.act_fn(gate.view(-1)) * up.view(-1)).view(gate.shape))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", flat)
    model, ids = LLAMA.model().eval(), token_ids(2, 7)
    before = logits_of(model, ids)
    with reordered_weights(model):
        assert shared_by(model) == set()
        assert sum(isinstance(module, LinearReordered) for module in model.modules()) >= 14
        assert_near(logits_of(model, ids), before, 1e-4)
    assert torch.equal(logits_of(model, ids), before)


def test_an_input_that_is_written_over_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    def over(self: Any, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(gate * self.up_proj(x.mul_(2)))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", over)
    model, ids = LLAMA.model().eval(), token_ids(2, 7)
    before = logits_of(model, ids)
    with reordered_weights(model):
        assert shared_by(model) == {("q_proj", "k_proj", "v_proj")}
        assert_near(logits_of(model, ids), before, 1e-4)


def test_memory_that_something_else_reads_too_stays() -> None:
    model: Any = TIED_LLAMA.model().eval()
    layer = model.model.layers[0].mlp
    both = torch.randn(2, *layer.gate_proj.weight.shape)
    layer.gate_proj.weight, layer.up_proj.weight = nn.Parameter(both[0]), nn.Parameter(both[1])
    with reordered_weights(model):
        assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
        assert layer.gate_proj.weight.untyped_storage()._cdata == both.untyped_storage()._cdata
    both.zero_()
    assert not layer.up_proj.weight.any(), "they are the same memory still"


def test_a_weight_that_the_models_own_code_reads_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def reading(self: Any, x: Tensor) -> Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(hidden.to(self.down_proj.weight.dtype))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", reading)
    model, ids = LLAMA.model().eval(), token_ids(2, 7)
    before = logits_of(model, ids)
    with reordered_weights(model):
        assert all(type(layer.mlp.down_proj) is nn.Linear for layer in model.model.layers)
        assert ("gate_proj", "up_proj") in shared_by(model)
        assert_near(logits_of(model, ids), before, 1e-4)


def test_few_steps_and_encoder_decoders_are_left_alone() -> None:
    model, seq2seq = LLAMA.model(), t5()
    for each, steps in ((model, 3), (seq2seq, None)):
        with reordered_weights(each, steps):
            assert not any(isinstance(module, LinearReordered) for module in each.modules())


def test_looking_draws_nothing() -> None:
    """A model in training, whose next dropout must be the one that it would have been."""
    model = LLAMA.model().train()
    state = torch.get_rng_state()
    with reordered_weights(model):
        pass
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (slimtune.LoraConfig(target_modules="all-linear"), 0),
        (slimtune.IA3Config(), 0),
        (slimtune.BottleneckConfig(), 0),
        # For the norms of its weight, which stay known for as long as that does.
        (slimtune.LoraConfig(target_modules="all-linear", use_dora=True), 1),
    ],
    ids=["lora", "ia3", "bottleneck", "dora"],
)
def test_an_adapter_that_comes_has_no_weight_written_out(config: Any, most: int) -> None:
    model: Any = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(), "first").eval()
    ids = token_ids(1, 4)
    with reordered_weights(model):
        model.add_adapter("second", config)
        model.eval()
        for batch in (["second"] * 4, ["first", "second"] * 2):
            product = RowProduct(8)
            with model.adapter_state.using(applied=(), rows=RowAdapters(tuple(batch), packed=True, product=product)):
                logits_of(model, ids)
        reads = [module.reads for module in model.modules() if isinstance(module, LinearReordered)]
        # DoRA's start, m = ||W||, reads it once more.
        assert max(reads) <= 2 * most


def test_a_model_that_wants_more_than_tokens_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LLAMA.model().eval()
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids, pixels: None)
    with reordered_weights(model):
        assert not any(isinstance(module, LinearReordered) for module in model.modules())
