"""The gradient of short attention in 16 bits: nearer to the exact one than torch's, in every model that attends so."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import slimtune
from slimtune.models import short_attention as module
from slimtune.models.shared_prefixes import shared_prefixes
from slimtune.models.short_attention import LONGEST, short_attention
from tensors import assert_same, randomize
from zoo import BERT, GEMMA3, GPT2, LLAMA, QWEN2, T5, VIT, Specimen

taken: list[int] = []
"""The keys of each attention whose gradient was taken in float32."""


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    taken.clear()
    backward = module._backward

    def counting(gradient: Tensor, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        assert {x.dtype for x in (gradient, query, key)} == {torch.float32}
        taken.append(key.shape[2])
        return backward(gradient, query, key, *rest, **options)

    monkeypatch.setattr(module, "_backward", counting)


def gradients(tensors: list[Tensor], output: Tensor, weights: Tensor) -> Tensor:
    found = torch.autograd.grad((output.float() * weights).sum(), tensors)
    return torch.cat([each.float().flatten() for each in found])


@given(
    rows=st.integers(1, 3), groups=st.integers(1, 3), shared=st.integers(1, 3), queries=st.integers(1, 40),
    before=st.integers(0, 40), kind=st.sampled_from(["none", "causal", "boolean", "summand", "by head"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]), scale=st.sampled_from([None, 0.3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_gradients_are_nearer_than_torch_s(
    rows: int, groups: int, shared: int, queries: int, before: int, kind: str, dtype: torch.dtype,
    scale: float | None, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    before = 0 if kind == "causal" else before
    keys, heads, width = before + queries, groups * shared, 16
    exact = [torch.randn(rows, n, length, width) for n, length in ((heads, queries), (groups, keys), (groups, keys))]
    exact = [each.to(dtype).float().requires_grad_() for each in exact]
    rounded = [each.detach().to(dtype).requires_grad_() for each in exact]
    sees = torch.arange(keys) <= torch.arange(before, keys)[:, None]
    mask = {"boolean": sees[None, None], "summand": torch.zeros(sees.shape).masked_fill_(~sees, -1e4)}.get(kind)
    if kind == "by head":
        mask = torch.randn(rows, heads, queries, keys)
    options: dict[str, Any] = {"is_causal": kind == "causal", "scale": scale, "enable_gqa": shared > 1}
    weights = torch.randn(rows, heads, queries, width)

    def of(tensors: list[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
        output = F.scaled_dot_product_attention(*tensors, attn_mask=mask, **options)
        return output.detach(), gradients(tensors, output, weights)

    def as_given(mask: Tensor | None) -> Tensor | None:
        return mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)

    right = of(exact, mask if mask is None or mask.dtype == torch.bool else mask.to(dtype).float())
    usual = of(rounded, as_given(mask))
    with module._ShortAttention():
        ours = of(rounded, as_given(mask))
    assert taken.pop() == keys
    assert torch.equal(ours[0], usual[0])
    errors = [float((found - right[1]).norm() / right[1].norm()) for _, found in (ours, usual)]
    assert errors[0] <= errors[1] * 1.05 + 1e-6


SPECIMENS: dict[str, Specimen] = {each.name: each for each in (LLAMA, QWEN2, GPT2, GEMMA3, BERT, T5, VIT)}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", SPECIMENS)
def test_a_model_computes_the_same_and_learns_the_same(name: str, checkpointed: bool) -> None:
    specimen = SPECIMENS[name]
    found: list[dict[str, Tensor]] = []
    for around in (nullcontext, short_attention):
        model = randomize(
            slimtune, slimtune.get_peft_model(specimen.model(), slimtune.LoraConfig(**specimen.options()))
        )
        model.to(torch.bfloat16).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        batch = {n: v.bfloat16() if v.is_floating_point() else v for n, v in specimen.batch().items()}
        with around():
            loss = model(**batch).loss
            loss.backward()
        gradient = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
        found.append({"loss": loss.detach(), "gradient": gradient})
    assert torch.equal(found[0]["loss"], found[1]["loss"])
    # Of 16 bits each, by two ways.
    assert float((found[0]["gradient"] - found[1]["gradient"]).norm() / found[0]["gradient"].norm()) < 2e-2
    # T5 adds a bias to its scores that is learned, which is torch's own.
    assert bool(taken) == (name != "T5")


def test_rows_that_share_their_beginning_take_it_too() -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(r=4)).to(torch.bfloat16).train()
    ids = torch.randint(4, 60, (4, 24))
    ids[1:, :16] = ids[0, :16]
    with short_attention(), shared_prefixes(model, always=True):
        model(input_ids=ids, labels=ids).loss.backward()
    # A family of children behind 16 shared tokens, and their beginning.
    assert set(taken) == {16, 24}


@pytest.mark.parametrize(
    ("keys", "dtype", "options"),
    [
        (LONGEST + 1, torch.bfloat16, {}),
        (8, torch.float32, {}),
        (8, torch.bfloat16, {"dropout_p": 0.5}),
    ],
    ids=["long", "float32", "dropout"],
)
def test_what_torch_does_best_is_left_to_it(keys: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    query, key = torch.randn(1, 2, 4, 8, dtype=dtype), torch.randn(1, 2, keys, 8, dtype=dtype, requires_grad=True)
    with module._ShortAttention():
        F.scaled_dot_product_attention(query, key, key, **options).sum().backward()
    assert not taken


def test_transformers_own_function_is_back_afterwards() -> None:
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with short_attention():
        inside = ALL_ATTENTION_FUNCTIONS["sdpa"]
        with short_attention():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is inside is not own
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is inside
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    model = LLAMA.model().to(torch.bfloat16)
    with short_attention(), torch.no_grad():
        found = model(**LLAMA.batch()).logits
    assert_same({"logits": found}, {"logits": model(**LLAMA.batch()).logits})


def test_what_somebody_else_registers_meanwhile_stays() -> None:
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    try:
        with short_attention():
            type(ALL_ATTENTION_FUNCTIONS).register("sdpa", other := lambda *_, **__: None)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other
    finally:
        type(ALL_ATTENTION_FUNCTIONS).register("sdpa", own)


@pytest.mark.parametrize("kind", ["strided", "fewer keys", "fewer values"])
def test_what_torch_takes_another_kernel_for_stays_torch_s(kind: str) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 12, 16).bfloat16().unbind()
    if kind == "strided":
        # As code has it that keeps queries, keys and values side by side in the last dimension.
        query, key, value = torch.stack([query, key, value], -1).unbind(-1)
    elif kind == "fewer keys":
        key = key[:1]
    else:
        value = value[:1]
    tensors = [each.detach().requires_grad_() for each in (query, key, value)]
    expected = F.scaled_dot_product_attention(*tensors)
    with module._ShortAttention():
        found = F.scaled_dot_product_attention(*tensors)
    assert torch.equal(found, expected)
    found.float().sum().backward()
    assert not taken


def test_another_function_that_comes_and_goes_inside_leaves_no_circle() -> None:
    own = AttentionInterface()["sdpa"]
    with short_attention():
        found = AttentionInterface()["sdpa"]
        AttentionInterface.register("sdpa", lambda *args, **kwargs: found(*args, **kwargs))
    # Whoever came last puts back what it has found, though that is over.
    AttentionInterface.register("sdpa", found)
    try:
        model = LLAMA.model().train()
        ids = torch.arange(12)[None]
        for within in (nullcontext, short_attention):
            with within():
                model(input_ids=ids, labels=ids).loss.backward()
    finally:
        AttentionInterface.register("sdpa", own)
