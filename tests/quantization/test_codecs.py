"""How much 4 bits lose, in the order of the QLoRA paper: NF4 least (Dettmers et al. 2023, table 2)."""

from __future__ import annotations

import pytest
from benchmarks.codecs import Codec, codecs, error, normal_weights

CODECS = {(codec.name, codec.block): codec for codec in codecs()}
BLOCKS = (32, 64, 128, 256)


def lost(codec: Codec, seed: int) -> float:
    return error(codec, [normal_weights(seed, (256, 512))])[0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block", BLOCKS)
def test_nf4_loses_least_of_normally_distributed_weights(block: int, seed: int) -> None:
    for double in ("", " + double quantization"):
        nf4, fp4 = (lost(CODECS[kind + double, block], seed) for kind in ("NF4", "FP4"))
        assert nf4 < fp4
        assert nf4 < lost(CODECS["int4", block], seed)


@pytest.mark.parametrize("kind", ["NF4", "FP4", "int4"])
def test_smaller_blocks_lose_less_and_store_more(kind: str) -> None:
    found = [error(CODECS[kind, block], [normal_weights(0, (256, 512))]) for block in BLOCKS]
    errors, bits = zip(*found, strict=True)
    assert list(errors) == sorted(errors)
    assert list(bits) == sorted(bits, reverse=True)


@pytest.mark.parametrize("kind", ["NF4", "FP4"])
def test_double_quantization_saves_more_than_a_quarter_of_a_bit_and_loses_next_to_nothing(kind: str) -> None:
    weights = [normal_weights(0, (1024, 1024))]
    (plain, bits), (double, fewer) = (
        error(CODECS[name, 64], weights) for name in (kind, kind + " + double quantization")
    )
    assert bits - fewer > 0.25
    assert double < 1.01 * plain


def test_int8_loses_a_tenth_of_what_4_bits_lose() -> None:
    assert lost(CODECS["int8", None], 0) < 0.1 * lost(CODECS["NF4", 32], 0)
