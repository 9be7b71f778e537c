"""Our own integers beyond the laws of all bases: one copy of the codes, packed kernels, what a state dict holds."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimtune
from kinds import Host
from slimtune.adapters.merge import unmerge
from slimtune.adapters.requantize import merge_requantized
from slimtune.bases import base_of
from slimtune.bases.int4 import LinearInt4
from slimtune.bases.int8 import EmbeddingInt8, LinearInt8, LinearW8A8
from slimtune.ops import int4_kernel
from slimtune.ops.grid import nearest_codes, rounded, searched_scales
from slimtune.storage.compressed import PACKED, SCALE, SHAPE, ZERO
from tensors import randomize

BF16 = torch.bfloat16
BITS = {LinearInt4: 4, LinearInt8: 8}
each_kind = pytest.mark.parametrize("kind", [LinearInt4, LinearInt8])


def layer(kind: Any, inputs: int = 128, outputs: int = 96, bias: bool = True, dtype: torch.dtype = BF16) -> Any:
    torch.manual_seed(0)
    module = nn.Linear(inputs, outputs, bias, dtype=dtype).requires_grad_(False)
    return into(kind, module)


def into(kind: Any, module: Any) -> Any:
    bits = BITS.get(kind, 8)
    group_size = 32 if bits == 4 else module.weight.shape[1]
    scales = searched_scales(module.weight, group_size, bits)
    kind.take(module, nearest_codes(module.weight, scales, bits), scales)
    return module


def weight(module: Any) -> Tensor:
    return base_of(module).weight(module)


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(BF16)


@each_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 128), (8, 128), (2, 3, 128), (128,)])
@torch.no_grad()
def test_few_tokens_give_the_product_of_the_expanded_weight(kind: Any, bias: bool, shape: tuple[int, ...]) -> None:
    module, x = layer(kind, bias=bias), inputs(*shape)
    assert base_of(module).for_few_tokens(module, x) is not None
    y, bias_O = module(x), None if module.bias is None else module.bias.float()
    expected = F.linear(x.float(), weight(module).float(), bias_O)
    assert y.dtype == BF16
    assert y.shape == expected.shape
    # Weights, scales and outputs are each rounded to bfloat16, to 2^-9 of their value at most.
    assert (y.float() - expected).norm() < 5e-3 * expected.norm()


@each_kind
@torch.no_grad()
def test_more_tokens_other_dtypes_and_odd_shapes_are_expanded(kind: Any) -> None:
    module = layer(kind)
    assert base_of(module).for_few_tokens(module, inputs(17, 128)) is None
    with torch.enable_grad():
        assert base_of(module).for_few_tokens(module, inputs(1, 128)) is None
    float32 = layer(kind, dtype=torch.float32)
    assert base_of(float32).for_few_tokens(float32, torch.randn(1, 128)) is None
    odd = layer(kind, outputs=40)
    assert base_of(odd).for_few_tokens(odd, inputs(1, 128)) is None
    assert torch.equal(odd(inputs(1, 128)), F.linear(inputs(1, 128), weight(odd), odd.bias))


@pytest.mark.parametrize("tokens", [1, 8, 20])
@torch.no_grad()
def test_zero_points_are_in_the_product_and_in_the_file(tokens: int) -> None:
    torch.manual_seed(0)
    # Weights that lie on one side: without zero points half of the codes would be for nothing.
    plain = nn.Linear(128, 96, dtype=BF16).requires_grad_(False)
    plain.weight.abs_()
    exact = plain.weight.float().clone()
    lost = {}
    for symmetric in (True, False):
        module: Any = copy.deepcopy(plain)
        LinearInt4.take(module, *rounded(module.weight, 32, 4, symmetric=symmetric))
        before, x = weight(module).float(), inputs(tokens, 128)
        y = module(x).float()
        assert (y - F.linear(x.float(), before, module.bias.float())).norm() < 8e-3 * y.norm()
        # The kernel's order of the codes, where there was one, stands for the same weight.
        assert torch.equal(weight(module).float(), before)
        lost[symmetric] = float((before - exact).norm())
        state = copy.deepcopy(module.state_dict())
        assert (ZERO in state) != symmetric
        other = layer(LinearInt4)
        other.load_state_dict(state)
        assert torch.equal(weight(other).float(), before)
    assert lost[False] < 0.6 * lost[True]


def test_scales_for_the_kernel_follow_a_merge_and_what_undoes_it() -> None:
    host: Any = Host(layer(LinearInt4))
    model = randomize(slimtune, slimtune.get_peft_model(host, slimtune.LoraConfig(r=4, target_modules=["site"]))).eval()
    x = inputs(1, 128)
    with torch.inference_mode(), model.disable_adapter():
        before = model(x)
    merge_requantized(model, ("default",), inputs={"x": inputs(1, 128).float().to(BF16)})
    with torch.inference_mode():
        assert not torch.equal(model(x), before)
    unmerge(model)
    with torch.inference_mode(), model.disable_adapter():
        assert torch.equal(model(x), before)


def test_a_plain_weight_is_not_cast_into_codes() -> None:
    for kind in (LinearInt8, LinearInt4, LinearW8A8):
        module = layer(kind)
        with pytest.raises(RuntimeError, match=r"held as codes|weight_scale"):
            module.load_state_dict(nn.Linear(128, 96).state_dict())


def test_an_answer_leaves_one_copy_of_the_same_weight() -> None:
    module = layer(LinearInt4)
    before, state = weight(module).clone(), copy.deepcopy(module.state_dict())
    size = sum(tensor.nbytes for tensor in base_of(module).held(module))
    with torch.inference_mode():
        module(inputs(1, 128))
    # The codes changed their order and not their number; beside them are scales as the kernel reads them.
    assert module.weight.dtype == torch.uint8
    assert sum(tensor.nbytes for tensor in base_of(module).held(module)) < 1.3 * size
    assert torch.equal(weight(module), before)
    after = module.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_learning_after_an_answer_is_learning_before_it() -> None:
    def gradients(answers: bool) -> list[Tensor]:
        host: Any = Host(layer(LinearInt4))
        config = slimtune.LoraConfig(r=4, target_modules=["site"])
        model = randomize(slimtune, slimtune.get_peft_model(host, config))
        if answers:
            with torch.inference_mode():
                model.eval()(inputs(1, 128))
        model.train()(inputs(20, 128)).square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    before, after = gradients(answers=False), gradients(answers=True)
    assert len(before) == 2
    for one, other in zip(before, after, strict=True):
        assert torch.allclose(one, other, rtol=1e-2, atol=1e-2 * float(one.abs().max()))


@pytest.mark.parametrize("answered", [False, True])
@each_kind
def test_a_state_dict_loads_again_and_has_the_names_of_the_format(kind: Any, answered: bool) -> None:
    module = layer(kind)
    if answered:
        with torch.inference_mode():
            module(inputs(1, 128))
    stored = io.BytesIO()
    torch.save(module.state_dict(), stored)
    stored.seek(0)
    other = into(kind, nn.Linear(128, 96, dtype=BF16))
    assert not torch.equal(weight(other), weight(module))
    state = torch.load(stored)
    assert set(state) == {"bias", PACKED, SCALE, SHAPE}
    other.load_state_dict(state)
    assert torch.equal(weight(other), weight(module))


@each_kind
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(kind: Any) -> None:
    module, state = layer(kind), layer(kind).state_dict()
    before = weight(module).clone()
    damaged = {
        "codes": state | {PACKED: state[PACKED][:, :-1]},
        "scales": state | {SCALE: state[SCALE].repeat(1, 7)},
        "finite": state | {SCALE: torch.full_like(state[SCALE], torch.nan)},
        "quantized from": state | {SHAPE: torch.tensor([96, 64])},
    }
    for said, one in damaged.items():
        with pytest.raises(RuntimeError, match=said):
            module.load_state_dict(one)
    incomplete = {name: tensor for name, tensor in state.items() if name != SCALE}
    with pytest.raises(RuntimeError, match=SCALE):
        module.load_state_dict(incomplete)
    assert torch.equal(weight(module), before)


@each_kind
def test_copies_share_nothing_and_dequantized_it_is_a_plain_layer(kind: Any) -> None:
    module = layer(kind)
    other = copy.deepcopy(module)
    assert torch.equal(weight(other), weight(module))
    assert other.weight.data_ptr() != module.weight.data_ptr()
    holder = nn.Sequential(other)
    expected = weight(module)
    slimtune.dequantize(holder)
    assert type(holder[0]) is nn.Linear
    assert torch.equal(holder[0].weight, expected)
    assert set(holder[0].state_dict()) == {"weight", "bias"}


class TestEmbedding:
    def made(self) -> Any:
        torch.manual_seed(0)
        return into(EmbeddingInt8, nn.Embedding(96, 64, dtype=BF16).requires_grad_(False))

    def test_rows_are_those_of_the_expanded_table(self) -> None:
        module, ids = self.made(), torch.tensor([[3, 0], [95, 3]])
        table = weight(module).t()
        assert table.shape == (96, 64)
        assert torch.equal(module(ids), table[ids])
        holder = nn.Sequential(module)
        slimtune.dequantize(holder)
        assert type(holder[0]) is nn.Embedding
        assert torch.equal(holder[0].weight, table)

    def test_adapters_attach_and_merge(self) -> None:
        host: Any = Host(self.made())
        model = randomize(slimtune, slimtune.get_peft_model(host, slimtune.LoraConfig(r=4, target_modules=["site"])))
        ids = torch.arange(96)[None]
        tuned = model.eval()(ids).float()
        merged = model.merge_and_unload()
        assert type(merged.site) is nn.Embedding
        assert (merged(ids).float() - tuned).norm() < 0.01 * tuned.norm()


def test_the_bound_of_tokens_is_the_kernels() -> None:
    module = layer(LinearInt4)
    with torch.no_grad():
        assert base_of(module).for_few_tokens(module, inputs(int4_kernel.MOST_TOKENS, 128)) is not None
        assert base_of(module).for_few_tokens(module, inputs(int4_kernel.MOST_TOKENS + 1, 128)) is None
