"""Methods of low rank written as LoRA: the same logits, and what `peft` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from slimtune import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from slimtune.errors import AdapterFileError
from slimtune.serve.convert import convert_to_lora
from slimtune.serve.remote import checked_for_vllm
from small_text_model import save_base, tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("convert") / "base")


def saved(base: Path, config: Any, folder: Path) -> Path:
    model = tiny_model()
    model.config.name_or_path = model.name_or_path = str(base)
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


CONFIGS: dict[str, Any] = {
    "adalora": AdaLoraConfig(target_r=2, init_r=4, total_step=10, target_modules=["q_proj", "up_proj"]),
    "vera": VeraConfig(r=8, target_modules=["q_proj", "o_proj"]),
    "loha": LoHaConfig(r=3, target_modules=["v_proj", "down_proj"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_converted_adapter_answers_alike(base: Path, tmp_path: Path, name: str) -> None:
    source = saved(base, CONFIGS[name], tmp_path / "source")
    with pytest.raises(AdapterFileError, match="not LoRA"):
        checked_for_vllm(source)
    assert convert_to_lora(source, tmp_path / "lora") < 1e-5
    assert checked_for_vllm(tmp_path / "lora")[0] == "LORA"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(tiny_model(), source).eval()(ids).logits
        plain = tiny_model()(ids).logits
        for library in (PeftModel, peft.PeftModel):
            logits = library.from_pretrained(tiny_model(), tmp_path / "lora").eval()(ids).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 0.01


def test_other_methods_are_refused(base: Path, tmp_path: Path) -> None:
    for number, config in enumerate((IA3Config(), LoraConfig(use_dora=True))):
        source = saved(base, config, tmp_path / f"source{number}")
        with pytest.raises(AdapterFileError, match="can't be written as LoRA"):
            convert_to_lora(source, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
