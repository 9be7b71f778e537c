"""Few tokens on quantized bases, as in decoding: what other kernels read from the codes is the expanded product."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import has_avx512bf16
from torch import nn

import slimtune
from kinds import Host
from quantizers import Quantizer, four_bit, int8
from slimtune.bases import base_of, claim
from slimtune.bases.packed import PackedLinear
from slimtune.ops import few_tokens
from tensors import randomize
from zoo import llama

INPUTS, OUTPUTS = 128, 96
BF16 = torch.bfloat16
KINDS = ("nf4", "nf4-double", "fp4", "int8")
BOUND = 5e-3
"""Block maxima, weights and outputs are each rounded to bfloat16, to 2^-9 of their value at most."""


def layer(kind: str, inputs: int = INPUTS, outputs: int = OUTPUTS, bias: bool = True, dtype: Any = BF16) -> Any:
    torch.manual_seed(0)
    quantize = int8 if kind == "int8" else four_bit(kind[:3], double="double" in kind, compute_dtype=dtype)
    holder = nn.Sequential(quantize(nn.Linear(inputs, outputs, bias, dtype=dtype)))
    holder.dtype = dtype  # type: ignore[assignment]
    claim(holder)
    return holder[0].requires_grad_(False)


def expanded(module: Any, x: torch.Tensor) -> torch.Tensor:
    weight = base_of(module).weight(module)
    return F.linear(x.float(), weight.float(), None if module.bias is None else module.bias.float())


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|, in the Euclidean norm."""
    return float((found - wanted).norm() / wanted.norm())


def tuned(base: Any) -> Any:
    config = slimtune.LoraConfig(r=4, target_modules="all-linear")
    return randomize(slimtune, slimtune.get_peft_model(base, config)).eval()


def taken(module: Any, x: torch.Tensor) -> bool:
    return base_of(module).for_few_tokens(module, x) is not None


each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@pytest.mark.parametrize("shape", [(1, 1, INPUTS), (16, INPUTS), (2, 3, INPUTS), (INPUTS,)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_the_product_is_that_of_the_expanded_weight(kind: str, shape: tuple[int, ...], bias: bool) -> None:
    module, x = layer(kind, bias=bias), torch.randn(shape, dtype=BF16)
    assert taken(module, x) == (kind == "int8" or has_avx512bf16())
    y = module(x)
    assert y.dtype == BF16
    assert y.shape == (*shape[:-1], OUTPUTS)
    assert distance(y.float(), expanded(module, x)) < BOUND


@each_kind
@torch.no_grad()
def test_an_input_that_is_not_contiguous(kind: str) -> None:
    module, x = layer(kind), torch.randn(INPUTS, 4, dtype=BF16).t()
    assert distance(module(x).float(), expanded(module, x)) < BOUND


@each_kind
def test_where_it_does_not_hold(kind: str) -> None:
    module, x = layer(kind), torch.randn(4, INPUTS, dtype=BF16)
    assert not taken(module, x)  # gradients may be wanted
    with torch.no_grad():
        assert not taken(module, torch.randn(few_tokens.MOST_TOKENS + 1, INPUTS, dtype=BF16))
        assert not taken(module, torch.randn(0, INPUTS, dtype=BF16))
        assert not taken(layer(kind, dtype=torch.float32), x.float())
        assert not taken(layer(kind, inputs=72), torch.randn(4, 72, dtype=BF16))
        assert not taken(layer(kind, outputs=100), x)


@each_kind
@torch.no_grad()
def test_under_autocast_and_in_float32(kind: str) -> None:
    module, x = layer(kind), torch.randn(4, INPUTS)
    assert module(x).dtype == torch.float32
    with torch.autocast("cpu", BF16):
        y = module(x)
    assert y.dtype == BF16
    assert distance(y.float(), expanded(module, x)) < 2 * BOUND


@each_kind
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_dora_expands_the_weight_once_for_its_norm(kind: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind != "int8" and not has_avx512bf16():
        pytest.skip("the kernel for 4 bits needs AVX512-BF16")
    config = slimtune.LoraConfig(r=4, use_dora=True, target_modules=["site"])
    model = randomize(slimtune, slimtune.get_peft_model(Host(layer(kind, bias=bias)), config)).eval()
    delta, x = model.site.deltas["default"], torch.randn(4, INPUTS, dtype=BF16)
    weight = base_of(model.site).weight(model.site).float()
    change = weight + delta.scaling * delta.lora_B @ delta.lora_A
    wanted = x.float() @ (delta.lora_magnitude_vector / change.norm(dim=1) * change.t())
    wanted = wanted if model.site.bias is None else wanted + model.site.bias
    expansions: list[int] = []
    own = PackedLinear.weight

    def counted(self: Any, module: Any) -> torch.Tensor:
        expansions.append(1)
        return own(self, module)

    monkeypatch.setattr(PackedLinear, "weight", counted)
    for _ in range(3):
        assert distance(model(x).float(), wanted) < 2 * BOUND
    assert len(expansions) == 1


@pytest.mark.skipif(not has_avx512bf16(), reason="the kernel for 4 bits needs AVX512-BF16")
class TestTheCopy:
    """What the kernel for 4 bits keeps beside the codes."""

    def test_the_codes_stay_as_they_are(self) -> None:
        module, x = layer("nf4-double"), torch.randn(4, INPUTS, dtype=BF16)
        before = copy.deepcopy(module.state_dict())
        wanted = base_of(module).weight(module)
        with torch.no_grad():
            module(x)
        assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
        assert torch.equal(base_of(module).weight(module), wanted)

    def test_it_is_made_once_and_goes_when_the_module_learns_or_dies(self) -> None:
        module, x = layer("nf4"), torch.randn(4, INPUTS, dtype=BF16)
        with torch.no_grad():
            module(x)
            made = few_tokens._COPIES[module].codes
            module(x)
        assert few_tokens._COPIES[module].codes is made
        module(x.requires_grad_())
        assert module not in few_tokens._COPIES
        with torch.no_grad():
            module(x)
        count = len(few_tokens._COPIES)
        del module
        gc.collect()
        assert len(few_tokens._COPIES) < count

    @torch.no_grad()
    def test_other_codes_are_another_copy(self) -> None:
        module, x = layer("nf4"), torch.randn(4, INPUTS, dtype=BF16)
        module(x)
        module.weight.copy_(module.weight.flip(0))
        assert distance(module(x).float(), expanded(module, x)) < BOUND
        module.weight.data = module.weight.data.flip(0)
        assert distance(module(x).float(), expanded(module, x)) < BOUND

    @torch.inference_mode()
    def test_in_inference_mode(self) -> None:
        with torch.inference_mode(False):
            module = layer("nf4")
        x = torch.randn(4, INPUTS, dtype=BF16)
        assert taken(module, x)
        assert distance(module(x).float(), expanded(module, x)) < BOUND
        assert not taken(layer("nf4"), x)  # made here, it can change without a trace

    @torch.no_grad()
    def test_a_copied_module_has_its_own(self) -> None:
        module, x = layer("nf4"), torch.randn(4, INPUTS, dtype=BF16)
        module(x)
        twin = copy.deepcopy(module)
        assert twin not in few_tokens._COPIES
        assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
@torch.no_grad()
def test_an_adapted_model_answers_as_with_expanded_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = Quantizer(kind, int8 if kind == "int8" else four_bit("nf4", double=True, compute_dtype=BF16))
    base: Any = quantizer.model(llama(hidden_size=128, intermediate_size=256).bfloat16())
    claim(base)
    model, exact = tuned(copy.deepcopy(base)), tuned(slimtune.dequantize(base).float())
    batch = {"input_ids": torch.randint(3, 30, (2, 6))}
    quick, wanted = model(**batch).logits.float(), exact(**batch).logits
    monkeypatch.setattr(few_tokens, "MOST_TOKENS", 0)
    expanded = model(**batch).logits.float()
    # The kernel for 4 bits is for CPUs with AVX512-BF16; elsewhere both are the expanded product.
    assert torch.equal(expanded, quick) == (kind != "int8" and not has_avx512bf16())
    # Another rounding, and no more of it.
    assert distance(quick, wanted) < 1.3 * distance(expanded, wanted)
