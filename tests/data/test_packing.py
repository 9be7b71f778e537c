"""Packed rows: full ones, in which no example sees another, and from which the same is learned as from padded ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from slimtune import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from slimtune.data.batches import IGNORED, Encoded, Objective, PackRows, PadRight
from slimtune.data.encode import encode
from slimtune.data.packing import best_fit, check_packs, pack
from slimtune.data.rows import Conversation
from slimtune.errors import ConfigError
from slimtune.recipe.training import TrainSettings
from slimtune.train.loop import fine_tune
from small_text_model import orders, tiny_model, tiny_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
SMALL: dict[str, Any] = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2}
MODELS = {
    "llama": lambda: tiny_model(vocab_size=90),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4)),
}
"""Rotary positions with and without biases, absolute ones, and a sliding window."""


def model(name: str, attention: str) -> Any:
    torch.manual_seed(0)
    found = MODELS[name]().eval()
    found.set_attn_implementation(attention)
    return found


def examples(count: int = 7) -> list[Encoded]:
    rng = random.Random(0)
    found = []
    for _ in range(count):
        ids = [rng.randrange(3, 90) for _ in range(rng.randrange(2, 14))]
        found.append(Encoded(ids, [IGNORED] + [i if rng.random() < 0.6 else IGNORED for i in ids[1:]]))
    return found


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 50))
def test_every_example_is_in_one_row_and_no_two_rows_could_be_one(lengths: list[int], room: int) -> None:
    rows = best_fit(lengths, room)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[index] for index in row) for row in rows)
    assert all(count <= room for count in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > room


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("is_flat", [False, True])
def test_loss_and_gradients_are_those_of_padded_batches(name: str, attention: str, is_flat: bool) -> None:
    found, gradients = [], []
    rows = examples()
    learned = sum(example.learned for example in rows)
    for batch in (PadRight(0)(rows), PackRows(0, is_flat)(pack(rows, 30))):
        trained = model(name, attention)
        loss = trained(**batch, num_items_in_batch=learned).loss
        loss.backward()
        found.append(loss.item())
        gradients.append({n: p.grad for n, p in trained.named_parameters()})
    assert found[1] == pytest.approx(found[0], rel=2e-6)
    assert batch["input_ids"].numel() < len(rows) * max(len(example.input_ids) for example in rows)
    for parameter, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_no_token_sees_another_example(name: str, attention: str) -> None:
    """One example is changed, and the logits of all others stay as they are, bit for bit."""
    row = examples(3)
    changed = [row[0], Encoded([(i + 5) % 90 for i in row[1].input_ids], row[1].labels), row[2]]
    trained = model(name, attention)
    before, after = (_logits(trained, PackRows(0)([r])) for r in (row, changed))
    start = len(row[0].input_ids)
    end = start + len(row[1].input_ids)
    assert torch.equal(before[0, :start], after[0, :start])
    assert torch.equal(before[0, end:], after[0, end:])
    assert not torch.allclose(before[0, start:end], after[0, start:end])


def _logits(trained: Any, batch: dict[str, Any]) -> torch.Tensor:
    return trained(**{name: value for name, value in batch.items() if name != "labels"}).logits


@pytest.mark.parametrize("name", MODELS)
def test_models_that_keep_examples_apart_may_pack(name: str) -> None:
    trained = model(name, "sdpa").train()
    check_packs(trained)
    assert trained.training
    check_packs(get_peft_model(trained, LoraConfig(r=2, target_modules="all-linear")))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: MambaForCausalLM(MambaConfig(**SMALL)), "MambaForCausalLM.*sees the one before it"),
        (
            lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32)),
            "OPTForCausalLM.*sees the one before it",
        ),
        (lambda: get_peft_model(tiny_model(), PromptTuningConfig(num_virtual_tokens=3)), "PROMPT_TUNING"),
        (lambda: get_peft_model(tiny_model(), PrefixTuningConfig(num_virtual_tokens=3)), "PREFIX_TUNING"),
    ],
)
def test_models_that_do_not_are_refused(build: Any, said: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=said):
        check_packs(build())


def test_positions_that_go_on_are_found_out() -> None:
    """A model that leaves the positions that it is given to themselves."""
    absolute = GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=32, n_layer=1, n_head=4, n_positions=32))
    forward = absolute.transformer.forward
    absolute.transformer.forward = lambda *a, position_ids=None, **k: forward(*a, **k)  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="packing can't go with GPT2LMHeadModel"):
        check_packs(absolute)


def test_an_example_that_is_not_what_it_is_alone_is_found_out() -> None:
    """Nothing is seen of the example before, but positions go on from its end."""
    moved = GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=32, n_layer=1, n_head=4, n_positions=32))
    embed, table = moved.transformer.wpe.forward, moved.transformer.wpe.weight
    torch.nn.init.normal_(table)
    moved.transformer.wpe.forward = lambda ids: embed(torch.arange(ids.shape[-1]).expand_as(ids))  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="GPT2LMHeadModel: in a packed row an example isn't what it is alone"):
        check_packs(moved)


@pytest.mark.parametrize("name", MODELS)
def test_rounding_to_sixteen_bits_is_no_reason_to_refuse(name: str) -> None:
    check_packs(model(name, "sdpa").bfloat16())


def test_a_training_step_is_the_same(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    rows = [Conversation.model_validate({"messages": order.messages()}) for order in orders(12)]
    data = encode(rows, tokenizer, 512).examples
    found = []
    for name, learn_from, collate in (("padded", data, PadRight(2)), ("packed", pack(data, 300), PackRows(2))):
        trained = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear"))
        settings = TrainSettings(learning_rate=0.01, max_steps=3, batch_size=len(learn_from), warmup=0)
        (tmp_path / name).mkdir()
        outcome = fine_tune(
            trained, tokenizer, learn_from, settings, tmp_path / name, Console(quiet=True), objective=Objective(collate)
        )
        assert outcome.tokens == 3 * sum(len(example.input_ids) for example in data)
        found.append((outcome.final_loss, [p.detach() for p in trained.parameters() if p.requires_grad]))
    (padded_loss, padded), (packed_loss, packed) = found
    assert packed_loss == pytest.approx(padded_loss, rel=1e-4)
    for ours, theirs in zip(packed, padded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(("slope", "is_refused"), [(0.5, True), (1e-4, False)])
def test_a_place_in_the_row_that_moves_the_answer_is_found_out(slope: float, is_refused: bool) -> None:
    """No example sees another here, but what an example is depends on where it stands."""
    moved = tiny_model()
    forward = moved.forward

    def by_place(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        places = torch.arange(outputs.logits.shape[1], dtype=outputs.logits.dtype)
        outputs.logits = outputs.logits * (1 + slope * places[:, None])
        return outputs

    moved.forward = by_place  # type: ignore[method-assign]
    if is_refused:
        with pytest.raises(ConfigError, match="an example isn't what it is alone"):
            check_packs(moved)
    else:
        check_packs(moved)


@pytest.mark.parametrize(("attention", "is_flat"), [("flash_attention_2", True), ("sdpa", False), (None, False)])
def test_flash_attention_gets_its_examples_in_one_row(attention: str | None, is_flat: bool) -> None:
    packed = tiny_model(vocab_size=90)
    packed.config._attn_implementation_internal = attention
    assert PackRows.of(packed, pad_id=0).is_flat == is_flat
