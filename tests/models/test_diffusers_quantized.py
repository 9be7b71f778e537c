"""Denoisers that diffusers quantized while loading: merged they are plain ones, and their adapters files as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from safetensors.torch import load_file

import slimtune
from denoisers import ATTENTION, DENOISERS, Denoiser
from slimtune.bases import base_of
from tensors import assert_near, assert_same, randomize

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CONFIGS = {
    "nf4": diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": diffusers.BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(autouse=True)
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets diffusers quantize where there is no GPU, which it refuses though bitsandbytes can."""
    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda *args, **options: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: device_map)


def tuned(denoiser: Denoiser, folder: Path, config: Any = None) -> Any:
    denoiser.model().save_pretrained(folder)
    options = {"quantization_config": config, "device_map": "cpu"} if config else {}
    base = type(denoiser.model()).from_pretrained(folder, torch_dtype=torch.float32, **options)
    lora = slimtune.LoraConfig(r=2, lora_alpha=5, target_modules=ATTENTION)
    return randomize(slimtune, slimtune.get_peft_model(base, lora)).eval()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("denoiser", DENOISERS.values(), ids=DENOISERS)
def test_merged_it_is_a_plain_one_that_diffusers_saves_and_loads(
    denoiser: Denoiser, config: Any, tmp_path: Path
) -> None:
    model = tuned(denoiser, tmp_path / "base", config)
    quantized = [m for m in model.modules() if base_of(m).dequantizer(m) is not None]
    assert quantized
    expected = denoiser.predict(model)
    merged = model.merge_and_unload()
    assert_near(denoiser.predict(merged), expected)
    assert [type(m) for m in merged.modules()] == [type(m) for m in denoiser.model().modules()]
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    assert "quantization_config" not in again.config
    assert torch.equal(denoiser.predict(again), denoiser.predict(merged))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("denoiser", DENOISERS.values(), ids=DENOISERS)
def test_the_file_for_a_pipeline_is_that_of_any_base(denoiser: Denoiser, config: Any, tmp_path: Path) -> None:
    files = [
        load_file(slimtune.save_diffusers_lora(tmp_path / name, **{denoiser.part: tuned(denoiser, tmp_path / "b", c)}))
        for name, c in (("quantized", config), ("plain", None))
    ]
    assert_same(*files)
