"""What holds on quantized bases beyond the laws of all bases: exact codes, nothing expanded kept, ways to run them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant, quantize_4bit
from hypothesis import given
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import slimtune
from kinds import Host
from quantizers import QUANTIZERS, Quantizer
from slimtune.bases import base_of
from slimtune.bases import bitsandbytes as ours
from tensors import (
    assert_near,
    loss_of,
    predict,
    randomize,
    relative_error,
    trainable,
)
from zoo import LLAMA_LINEARS, QUANTIZED, Specimen

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
each_specimen = pytest.mark.parametrize("specimen", QUANTIZED, ids=lambda specimen: specimen.name)
OF_BNB = [quantizer for quantizer in QUANTIZERS if quantizer.name in ("nf4", "nf4-double", "fp4-128", "int8")]


def looked_up(codes: Tensor, state: Any) -> Tensor:
    """The weight by the definition: high half of a byte first, codebook[code] * absmax of its block, rounded once."""
    absmax = state.absmax
    if state.nested:
        second = state.state2
        blocks = torch.arange(absmax.numel()) // second.blocksize
        absmax = second.code[absmax.long()] * second.absmax[blocks] + state.offset
    halves = [(byte >> 4, byte & 15) for byte in codes.view(torch.uint8).flatten().tolist()]
    count = state.shape.numel()
    flat = torch.tensor([half for pair in halves for half in pair])[:count]
    of_block = absmax.float()[torch.arange(count) // state.blocksize]
    return (state.code.float()[flat] * of_block).to(state.dtype).view(state.shape)


@given(
    rows=st.integers(1, 40),
    columns=st.sampled_from([1, 3, 32, 48, 64, 100, 129, 256]),
    block=st.sampled_from(BLOCKS),
    kind=st.sampled_from(["nf4", "fp4"]),
    double=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    storage=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 3),
)
def test_quantized_then_expanded_is_the_definition_to_the_bit(
    rows: int, columns: int, block: int, kind: str, double: bool, dtype: torch.dtype, storage: torch.dtype, seed: int
) -> None:
    if rows * columns % (2 * storage.itemsize):
        columns *= 2 * storage.itemsize  # bitsandbytes packs no part of a number
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    codes, state = quantize_4bit(
        weight, blocksize=block, compress_statistics=double, quant_type=kind, quant_storage=storage
    )
    found = ours.expand_4bit(codes, state)
    assert found.dtype == dtype
    assert torch.equal(found, looked_up(codes, state))


@pytest.mark.parametrize("double", [False, True], ids=["", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [block for block in BLOCKS if block <= 1024])
def test_expanded_is_bitsandbytes_own_to_the_bit(block: int, kind: str, double: bool) -> None:
    """Where its kernel for CPUs is right: rows of whole blocks, not larger than 1024."""
    for dtype in DTYPES:
        weight = torch.randn(6, 2 * block).to(dtype)
        codes, state = quantize_4bit(weight, blocksize=block, compress_statistics=double, quant_type=kind)
        assert torch.equal(ours.expand_4bit(codes, state), dequantize_4bit(codes, state))


@given(st.integers(1, 30), st.integers(1, 70), st.integers(0, 3))
def test_int8_expanded_is_bitsandbytes_own_to_the_bit(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).half()
    codes, scales, _ = int8_vectorwise_quant(weight)
    assert torch.equal(ours.expand_8bit(codes, scales, torch.float32), int8_vectorwise_dequant(codes, scales))


def test_nf4_loses_less_than_fp4_on_a_normal_weight() -> None:
    weight = torch.randn(64, 256)
    errors = {}
    for kind in ("nf4", "fp4"):
        codes, state = quantize_4bit(weight, blocksize=64, quant_type=kind)
        errors[kind] = float((ours.expand_4bit(codes, state) - weight).norm() / weight.norm())
    assert 0 < errors["nf4"] < errors["fp4"] < 0.2


class Live(TorchDispatchMode):
    """Which tensors of floating numbers that came about meanwhile are as large as this, and still there."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.seen = count, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            if tensor.untyped_storage().nbytes() >= self.count * tensor.element_size():
                self.seen.append((str(func), tuple(tensor.shape), StorageWeakRef(tensor.untyped_storage())))
        return made

    @property
    def alive(self) -> list[Any]:
        return [(name, shape) for name, shape, storage in self.seen if not storage.expired()]


def saved_in(found: list[Tensor]) -> Any:
    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    return note


@contextmanager
def counting_expansions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    calls: list[str] = []

    def counted(name: str, function: Any) -> Any:
        return lambda *args: calls.append(name) or function(*args)

    with monkeypatch.context() as patch:
        for name in ("expand_4bit", "expand_8bit"):
            patch.setattr(ours, name, counted(name, getattr(ours, name)))
        yield calls


IN, OUT = 80, 96
AT_SITE: dict[str, Any] = {"target_modules": ["site"]}
KEEPING_NOTHING = {
    "lora": slimtune.LoraConfig(r=4, **AT_SITE),
    "lora-dropout": slimtune.LoraConfig(r=4, lora_dropout=0.1, **AT_SITE),
    "dora": slimtune.LoraConfig(r=4, use_dora=True, **AT_SITE),
    "pissa": slimtune.LoraConfig(r=4, init_lora_weights="pissa", **AT_SITE),
    "adalora": slimtune.AdaLoraConfig(target_r=2, init_r=4, **AT_SITE),
    "ia3": slimtune.IA3Config(**AT_SITE),
    "ia3-in-front": slimtune.IA3Config(feedforward_modules=["site"], **AT_SITE),
    "loha": slimtune.LoHaConfig(r=4, **AT_SITE),
    "lokr": slimtune.LoKrConfig(r=4, **AT_SITE),
    "vera": slimtune.VeraConfig(r=4, **AT_SITE),
    "bitfit": slimtune.BitFitConfig(add_bias=True, **AT_SITE),
    "bottleneck": slimtune.BottleneckConfig(bottleneck_size=4, **AT_SITE),
}
READING_THE_WEIGHT_TO_START = {"dora", "pissa"}


@pytest.mark.parametrize("quantizer", OF_BNB, ids=repr)
@pytest.mark.parametrize("name", [*KEEPING_NOTHING, "none"])
def test_a_step_expands_twice_and_keeps_nothing_expanded(
    name: str, quantizer: Quantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bias in (True, False):
        model = Host(quantizer.linear(IN, OUT, bias)).requires_grad_(False)
        with counting_expansions(monkeypatch) as calls:
            if name != "none":
                model = slimtune.get_peft_model(model, copy.deepcopy(KEEPING_NOTHING[name]))
            assert len(calls) == (name in READING_THE_WEIGHT_TO_START)
            model = model.train() if name == "none" else randomize(slimtune, model).train()
            calls.clear()
            x = torch.randn(2, 3, IN).requires_grad_()
            saved: list[Tensor] = []
            hooks = torch.autograd.graph.saved_tensors_hooks(saved_in(saved), lambda t: t)
            with Live(IN * OUT) as live, hooks:
                y = model(x)
            sizes = [tensor.numel() for tensor in saved]
            saved.clear()
            assert live.seen != []
            assert live.alive == []
            assert max(sizes, default=0) < IN * OUT
            assert len(calls) == 1
            y.square().sum().backward()
            assert len(calls) == 2
        assert torch.as_tensor(x.grad).any()


def test_something_kept_would_be_seen() -> None:
    """What the test above goes by, on a product that keeps its weight."""
    site = QUANTIZERS[0].linear(IN, OUT)
    x = torch.randn(2, 3, IN).requires_grad_()
    with Live(IN * OUT) as live:
        y = nn.functional.linear(x, base_of(site).weight(site))
    assert live.alive != []
    y.sum().backward()


LLAMA_LORA: dict[str, Any] = {"r": 4, "target_modules": LLAMA_LINEARS}
VARIANTS: dict[str, Any] = {
    "dora": slimtune.LoraConfig(use_dora=True, **LLAMA_LORA),
    "rslora-bias": slimtune.LoraConfig(use_rslora=True, bias="all", **LLAMA_LORA),
    "pissa": slimtune.LoraConfig(init_lora_weights="pissa", **LLAMA_LORA),
    "pissa-randomised": slimtune.LoraConfig(init_lora_weights="pissa_niter_4", **LLAMA_LORA),
    "olora": slimtune.LoraConfig(init_lora_weights="olora", **LLAMA_LORA),
    "orthogonal": slimtune.LoraConfig(init_lora_weights="orthogonal", **LLAMA_LORA),
    "eva": slimtune.LoraConfig(init_lora_weights="eva", **LLAMA_LORA),
    "layer-saved-whole": slimtune.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["up_proj"]),
    "full-copies": slimtune.FullConfig(store="whole"),
    "last-layer-quantized": slimtune.LastLayerConfig(target_modules=["model.layers.1.mlp.down_proj"]),
    "ia3-in-front": slimtune.IA3Config(target_modules=LLAMA_LINEARS, feedforward_modules=LLAMA_LINEARS),
    "bitfit-added": slimtune.BitFitConfig(add_bias=True),
    "pfeiffer": slimtune.BottleneckConfig(placement="pfeiffer", bottleneck_size=4),
    "parallel": slimtune.BottleneckConfig(placement="parallel", bottleneck_size=4),
    "loha-dropout": slimtune.LoHaConfig(r=4, rank_dropout=0.2, target_modules=LLAMA_LINEARS),
    "lokr-both": slimtune.LoKrConfig(r=2, decompose_both=True, target_modules=LLAMA_LINEARS),
    "tokens-beside": slimtune.LoraConfig(trainable_token_indices=[5, 9], **LLAMA_LORA),
}
UNMERGEABLE = {"bitfit-added", "pfeiffer", "parallel"}


@pytest.mark.one_in(3)
@each_specimen
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_starts_at_the_base_learns_folds_and_goes_again(
    name: str, specimen: Specimen, tmp_path: Path
) -> None:
    batch, base = specimen.batch(), specimen.model()
    storages = {n: p.data_ptr() for n, p in base.named_parameters()}
    expected = predict(base, batch)
    model = slimtune.get_peft_model(base, copy.deepcopy(VARIANTS[name]))
    assert_near(predict(model, batch), expected, 1e-5)
    randomize(slimtune, model)
    loss_of(model.train(), batch).backward()
    gradients = {n: p.grad for n, p in trainable(model).items()}
    assert [n for n, g in gradients.items() if g is None] == []
    assert [n for n, p in model.named_parameters() if p.grad is not None and "deltas." not in n] == []
    tuned = predict(model, batch)
    assert relative_error(tuned, expected) > 1e-4
    if name not in UNMERGEABLE:
        model.merge_adapter()
        assert_near(predict(model, batch), tuned, 1e-4)
        model.unmerge_adapter()
        assert torch.equal(predict(model, batch), tuned)
    model.save_pretrained(tmp_path)
    reread = slimtune.PeftModel.from_pretrained(specimen.model(), tmp_path)
    assert_near(predict(reread, batch), tuned, 1e-5)
    plain = model.unload()
    assert {n: p.data_ptr() for n, p in plain.named_parameters()} == storages
    assert torch.equal(predict(plain, batch), expected)


@each_specimen
def test_codes_are_no_parameters_to_update(specimen: Specimen) -> None:
    path = "model.layers.0.mlp.up_proj.weight"
    for config in (
        {"target_parameters": [path]},
        {"target_parameters": ["up_proj.weight"], "target_modules": ["q_proj"]},
    ):
        with pytest.raises(slimtune.errors.SlimtuneError, match="up_proj"):
            slimtune.get_peft_model(specimen.model(), slimtune.LoraConfig(r=2, **config))
