"""Folders that compressed-tensors itself wrote: the weights and answers here are those that it reads from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import slimtune
from slimtune.bases import base_of
from slimtune.bases.integer import HoldsCodes
from slimtune.storage.compressed import ZERO
from small_text_model import tiny_model
from tensors import assert_near

compressed_tensors = pytest.importorskip("compressed_tensors")
quantization = pytest.importorskip("compressed_tensors.quantization")

IDS = torch.arange(3, 60)[None]
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
GROUPS = {"group": {"group_size": 32}, "channel": {}, "tensor": {}}
VARIANTS: dict[str, tuple[dict[str, Any], str | None, bool]] = {
    f"{bits} bits, {strategy}, {'symmetric' if symmetric else 'asymmetric'}, {form}": (
        {"num_bits": bits, "strategy": strategy, "symmetric": symmetric, **GROUPS[strategy]}, form, False,
    )
    for bits in (4, 8) for strategy in GROUPS for symmetric in (True, False)
    for form in (("pack-quantized",) if bits == 4 else ("pack-quantized", "int-quantized"))
} | {
    f"W8A8, {strategy}": ({"num_bits": 8, "strategy": strategy, "symmetric": True}, None, True)
    for strategy in ("channel", "tensor")
}  # fmt: skip
"""How the library is asked to quantize: the weights, the format, and whether inputs are rounded."""


def written(folder: Path, weights: dict[str, Any], form: str | None, rounds_inputs: bool) -> Any:
    """A tiny model quantized, compressed and saved by the library, its ranges those of the weights; expanded again."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    model: Any = tiny_model()
    scheme: dict[str, Any] = {"targets": ["Linear"], "weights": weights, "format": form}
    scheme |= {"input_activations": TOKENS} if rounds_inputs else {}
    config = quantization.QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            args = module.quantization_scheme.weights
            weight = module.weight.detach()
            rows = {"tensor": weight.view(1, -1), "channel": weight, "group": weight.view(weight.shape[0], -1, 32)}
            groups = rows[weights["strategy"]]
            low, high = groups.amin(-1, keepdim=groups.dim() == 2), groups.amax(-1, keepdim=groups.dim() == 2)
            scale, zero = calculate_qparams(low, high, args)
            module.weight_scale.data.copy_(scale.view(module.weight_scale.shape))
            if not weights["symmetric"]:
                module.weight_zero_point.data.copy_(zero.view(module.weight_zero_point.shape))
            module.quantization_status = quantization.QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    assert compressor is not None
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    compressor.decompress_model(model)
    return model


@torch.no_grad()
def answers(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits.float()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore")
def test_what_the_library_wrote_has_the_weights_and_answers_that_it_reads(name: str, tmp_path: Path) -> None:
    theirs = written(tmp_path, *VARIANTS[name])
    expected = answers(theirs)
    model, _ = slimtune.load(tmp_path)
    held = {path: module for path, module in model.named_modules() if isinstance(module, HoldsCodes)}
    assert len(held) == 14
    assert all((ZERO in module._buffers) == ("asymmetric" in name) for module in held.values())
    for path, module in held.items():
        assert_near(base_of(module).weight(module), theirs.get_submodule(path).weight, 1e-6)
        x = torch.randn(2, 9, module.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert_near(module(x), theirs.get_submodule(path)(x), 1e-5)
    # An input in the middle between two codes goes one way or the other by the order of sums before it.
    bound = 3e-2 if "W8A8" in name else 1e-5
    assert_near(answers(model), expected, bound)
    # Written here, it is read here and there as it was.
    model.save_pretrained(tmp_path / "again")
    again, _ = slimtune.load(tmp_path / "again")
    assert torch.equal(answers(again), answers(model))
    # transformers makes no place for zero points that are packed, not those of the library's own files either.
    if "asymmetric" not in name:
        by_them = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
        assert_near(answers(by_them), answers(model), bound)
