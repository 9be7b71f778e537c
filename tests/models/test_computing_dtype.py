"""Which dtype `auto` is, by what the model is stored in, what it is loaded for and what the processor computes in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimtune.models.device import computing_dtype, cpu_dtypes, is_emulated
from slimtune.models.load import LoadOptions, Work, computing_dtype_of, load_model
from slimtune.quantization.config import few_tokens_read_codes, settings_of
from small_text_model import save_half_base

HERE = torch.float32 if is_emulated("bfloat16", "cpu") else torch.bfloat16
"""What a base in bf16 is loaded in by this machine's processor, to train or to answer."""


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [
        ("flags : fma avx2 f16c", set()),
        ("flags : avx512f avx512_vnni avx512vl", set()),
        ("flags : avx512f avx512_bf16", {"bfloat16"}),
        ("flags : avx2 amx_bf16 amx_tile", {"bfloat16"}),
        ("flags : avx512_bf16 avx512_fp16", {"bfloat16", "float16"}),
        ("Features : fp asimd asimdhp", {"float16"}),
        ("Features : fp asimd asimdhp bf16", {"bfloat16", "float16"}),
        ("", set()),
    ],
)
def test_a_processor_is_known_by_its_flags(cpuinfo: str, native: set[str]) -> None:
    assert cpu_dtypes(cpuinfo) == native


@pytest.mark.parametrize(
    ("stored", "device", "native", "chosen"),
    [
        ("bfloat16", "cpu", [], "float32"),
        ("float16", "cpu", [], "float32"),
        ("bfloat16", "cpu", ["bfloat16"], "auto"),
        ("float16", "cpu", ["bfloat16"], "float32"),
        ("float16", "cpu", ["bfloat16", "float16"], "auto"),
        ("float32", "cpu", [], "auto"),
        ("float64", "cpu", [], "auto"),
        (None, "cpu", [], "float32"),
        (None, "cpu", ["bfloat16"], "auto"),
        ("bfloat16", "cuda", [], "auto"),
        ("bfloat16", "cuda:1", [], "auto"),
        ("float16", "mps", [], "auto"),
    ],
)
def test_float32_stands_for_what_is_only_emulated(
    stored: str | None, device: str, native: list[str], chosen: str
) -> None:
    assert computing_dtype(stored, device, native) == chosen


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_half_base(tmp_path_factory.mktemp("half") / "base")


@pytest.mark.parametrize(
    ("computes", "quantize", "dtype", "expected"),
    [
        (None, None, "auto", torch.bfloat16),
        ("batches", None, "auto", HERE),
        ("tokens", None, "auto", HERE),
        ("batches", None, "bfloat16", torch.bfloat16),
        ("tokens", "nf4", "auto", HERE),
        ("batches", "int8", "auto", HERE),
        # A kernel reads these codes, with inputs in bf16.
        ("tokens", "int8", "auto", torch.bfloat16),
        ("tokens", "int4", "auto", torch.bfloat16),
        ("tokens", "int4", "float32", torch.float32),
    ],
)
def test_a_model_is_loaded_for_its_work(
    half: Path, computes: Work | None, quantize: str | None, dtype: str, expected: torch.dtype
) -> None:
    model, _ = load_model(str(half), "text", LoadOptions(dtype, "cpu", quantize=quantize, computes=computes))
    assert model.dtype == expected


@pytest.mark.parametrize(
    ("stored", "quantize", "reads"),
    [
        (None, None, False),
        (None, "nf4", False),
        (None, "int8", True),
        (None, "int4", True),
        ({"quant_method": "compressed-tensors"}, None, True),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, None, True),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None, False),
    ],
)
def test_which_bases_are_read_as_codes(stored: dict[str, str] | None, quantize: str | None, reads: bool) -> None:
    config = type("Config", (), {"quantization_config": stored})
    assert few_tokens_read_codes(config, settings_of(quantize) if quantize else None) == reads


def test_other_libraries_kernels_get_the_dtype_that_they_were_made_for() -> None:
    config = type("Config", (), {"dtype": torch.float16, "quantization_config": {"quant_method": "gptq"}})
    assert computing_dtype_of(config, "cpu") == "auto"
