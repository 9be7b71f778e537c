"""Integer grids: packing and the order of the kernel are undone to the bit; a searched range loses no more than all."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from slimtune.ops import grid, int4_kernel


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 9))
def test_nibbles_are_packed_and_unpacked_to_the_bit(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = grid.pack(codes, 4)
    assert packed.shape == (rows, -(-columns // 8))
    # By the definition of the format: code + 8 in bits 4 i to 4 i + 3, the first lowest.
    assert (int(packed[0, 0]) & 0xF) - 8 == int(codes[0, 0])
    assert torch.equal(grid.unpack(packed, columns, 4), codes)


@given(blocks=st.integers(1, 11), groups=st.integers(1, 3), seed=st.integers(0, 9))
def test_the_order_of_the_kernel_is_undone_to_the_bit(blocks: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (16 * blocks, 32 * groups), generator=generator, dtype=torch.int8)
    assert int4_kernel.takes(*codes.shape, 32)
    packed = int4_kernel.to_kernel(codes)
    assert packed.numel() * 2 == codes.numel()
    assert torch.equal(int4_kernel.from_kernel(packed), codes.t())
    assert torch.equal(int4_kernel.from_kernel(packed, torch.bfloat16), codes.t().bfloat16())
    # On the device of the codes: a model may move after its first answer.
    assert int4_kernel.from_kernel(packed.to("meta")).device.type == "meta"


@pytest.mark.parametrize(("outputs", "inputs", "group_size"), [(40, 64, 32), (64, 96, 96), (64, 48, 32), (8, 64, 64)])
def test_what_the_kernel_does_not_take_is_known(outputs: int, inputs: int, group_size: int) -> None:
    assert not int4_kernel.takes(outputs, inputs, group_size)


@given(bits=st.sampled_from([4, 8]), group_size=st.sampled_from([4, 16, 32]), seed=st.integers(0, 9))
def test_the_searched_range_loses_no_more_than_the_whole(bits: int, group_size: int, seed: int) -> None:
    weight, importance = normal(6, 32, seed), normal(1, 32, seed + 100).square()[0]

    def error(scales: Tensor) -> float:
        expanded = grid.expand(grid.nearest_codes(weight, scales, bits), scales, torch.float32)
        return float(((expanded - weight).square() * importance).sum())

    whole = grid.extreme_scales(weight, group_size, bits).to(grid.SCALE_DTYPE)
    searched = grid.searched_scales(weight, group_size, bits, importance)
    assert searched.dtype == grid.SCALE_DTYPE
    assert error(searched) <= error(whole) * (1 + 1e-5)
    if bits == 4:
        assert error(searched) < error(whole)


@given(bits=st.sampled_from([4, 8]), seed=st.integers(0, 9))
def test_a_signed_scale_reaches_the_largest_entry(bits: int, seed: int) -> None:
    weight = normal(5, 32, seed)
    scales = grid.extreme_scales(weight, 8, bits)
    codes = grid.nearest_codes(weight, scales, bits).view(5, 4, 8)
    assert (codes == grid.code_range(bits)[0]).any(-1).all()
    assert not (weight.abs() > 1.0001 * scales.abs().repeat_interleave(8, 1) * (1 << bits - 1)).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_zeros_stay_zeros(bits: int) -> None:
    weight = torch.zeros(4, 16)
    weight[0, :8] = torch.arange(8.0)
    scales = grid.searched_scales(weight, 8, bits)
    expanded = grid.expand(grid.nearest_codes(weight, scales, bits), scales, torch.float32)
    assert expanded.isfinite().all()
    assert not expanded[1:].any()
    assert not expanded[0, 8:].any()


def lost(weight: Tensor, new: grid.GridWeight, importance: Tensor) -> float:
    expanded = grid.expand(new.codes, new.scales, torch.float32, new.zeros)
    return float(((expanded - weight).square() * importance).sum())


@given(symmetric=st.booleans(), group_size=st.sampled_from([8, 16, 32]), seed=st.integers(0, 9))
def test_a_range_is_clipped_by_the_error_that_is_asked(symmetric: bool, group_size: int, seed: int) -> None:
    """By the plain squared error without activations, and by theirs with them: each is best by its own measure."""
    weight, importance = normal(8, 32, seed), normal(1, 32, seed + 100).square()[0] + 0.01
    plain = grid.rounded(weight, group_size, 4, None, symmetric)
    weighted = grid.rounded(weight, group_size, 4, importance, symmetric)
    ones = torch.ones(32)
    assert (plain.zeros is None) == symmetric
    assert lost(weight, plain, ones) <= lost(weight, weighted, ones) * (1 + 1e-5)
    assert lost(weight, weighted, importance) <= lost(weight, plain, importance) * (1 + 1e-5)
    # What isn't clipped is among the candidates.
    if symmetric:
        whole = grid.extreme_scales(weight, group_size, 4).to(grid.SCALE_DTYPE)
        whole = grid.GridWeight(grid.nearest_codes(weight, whole, 4), whole)
        assert lost(weight, plain, ones) < lost(weight, whole, ones)


@given(bits=st.sampled_from([4, 8]), seed=st.integers(0, 9), shift=st.sampled_from([0.0, 2.0, -5.0]))
def test_an_asymmetric_grid_holds_zero_and_what_lies_on_one_side(bits: int, seed: int, shift: float) -> None:
    weight = normal(6, 64, seed) + shift
    weight[0, :32] = 0.0
    new = grid.rounded(weight, 32, bits, symmetric=False)
    assert new.zeros is not None
    expanded = grid.expand(new.codes, new.scales, torch.float32, new.zeros)
    assert (expanded[0, :32] == 0).all()
    lowest, highest = grid.code_range(bits)
    assert int(new.zeros.min()) >= lowest
    assert int(new.zeros.max()) <= highest
    if abs(shift) >= 2:
        ones = torch.ones(64)
        assert lost(weight, new, ones) < lost(weight, grid.rounded(weight, 32, bits), ones)
    # Half a step by rounding to a code; at the ends of the range half a step more by rounding the zero point, and as
    # much by rounding the scale to bfloat16, which counts 255 times.
    if bits == 8:
        step = new.scales.float().abs().repeat_interleave(32, dim=1)
        assert ((expanded - weight).abs() <= 1.5 * step + 1e-6).all()
