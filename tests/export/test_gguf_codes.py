"""What `slimtune quantize` wrote, in GGUF: the same codes, rounded once, and llama.cpp's answers by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import slimtune
from export.architectures import MODELS, byte_level_tokenizer, seeded
from export.llama_cpp import LlamaCpp, greedy
from slimtune.bases import base_of
from slimtune.bases.integer import HoldsCodes
from slimtune.export.formats import ExportOptions, export
from slimtune.export.gguf.architectures import architecture_of
from slimtune.export.gguf.codes import tensors_with_codes
from slimtune.export.gguf.writer import read_tensors, tensors_of, write_model
from slimtune.slim.quantize import QuantizeConfig, quantize_
from tensors import assert_near

PROMPTS = ([5, 6, 7, 300, 44, 90, 91, 92, 93, 94, 95], [10, 20, 30])
CONFIGS = {
    "W4A16 in groups of 32": (QuantizeConfig(method="rtn", group_size=32), "Q4_0"),
    "W4A16 in groups of 64, int8 head": (QuantizeConfig(method="rtn", head="int8"), "Q4_0"),
    "W8A16": (QuantizeConfig("W8A16"), "Q8_0"),
    "W8A8": (QuantizeConfig("W8A8"), "Q8_0"),
}


@pytest.fixture(scope="module")
def byte_level() -> Any:
    return byte_level_tokenizer()


def written(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama3", "gpt2"])
@pytest.mark.parametrize("how", CONFIGS)
def test_the_file_has_the_very_codes(how: str, name: str, byte_level: Any, tmp_path: Path) -> None:
    import gguf

    config, kind = CONFIGS[how]
    model = quantize_(seeded(MODELS[name]), config)
    weights = {
        f"{path}.weight": base_of(module).weight(module).float()
        for path, module in model.named_modules()
        if isinstance(module, HoldsCodes)
    }
    tensors, notes = tensors_with_codes(model, None)
    assert any(f"keep their codes as {kind}" in note for note in notes)
    write_model(tmp_path / "model.gguf", architecture_of(model), model.config, tensors, byte_level)
    stored = [tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors]
    assert (
        stored.count(kind) == sum(isinstance(m, HoldsCodes) for m in model.model.layers.modules())
        if name == "llama3"
        else 12
    )
    slimtune.dequantize(model)
    read = read_tensors(tmp_path / "model.gguf", architecture_of(model), model.config, list(tensors_of(model)))
    found = {own: tensor for own, tensor in read if own in weights}
    assert len(found) >= len(weights) - 1  # a tied head is the embedding
    for own, tensor in found.items():
        # As the codes stand for, whichever way round: no number was rounded a second time.
        is_turned = tensor.shape != weights[own].shape or name == "gpt2" or "embed" in own
        assert torch.equal(tensor.t() if is_turned else tensor, weights[own]), own


@torch.no_grad()
@pytest.mark.parametrize("how", CONFIGS)
def test_llama_cpp_answers_as_the_folder_does(how: str, byte_level: Any, tmp_path: Path) -> None:
    config, kind = CONFIGS[how]
    folder = written(tmp_path / "codes", quantize_(seeded(MODELS["llama3"]), config), byte_level)
    exported = export(str(folder), "gguf", tmp_path / "gguf", ExportOptions())
    assert any(f"keep their codes as {kind}" in note for note in exported.notes)
    engine = LlamaCpp(tmp_path / "gguf" / "model.gguf")
    model, _ = slimtune.load(folder)
    # llama.cpp rounds the inputs of such products to 8 bits, so that a choice between near tokens may fall otherwise.
    same = [a == b for p in PROMPTS for a, b in zip(engine.greedy(p, 6), greedy(model, p, 6), strict=True)]
    assert sum(same) >= 8, same


def test_what_does_not_fit_is_expanded_and_said(byte_level: Any, tmp_path: Path) -> None:
    for config, kind, said in (
        (QuantizeConfig(method="rtn", group_size=32, symmetric=False), None, "Q4_0 has no zero points"),
        (QuantizeConfig(method="rtn", group_size=32), "Q8_0", "their codes are in 4 bits, and Q8_0 was asked for"),
    ):
        folder = written(tmp_path / f"codes-{kind}", quantize_(seeded(MODELS["qwen2"]), config), byte_level)
        exported = export(str(folder), "gguf", tmp_path / f"gguf-{kind}", ExportOptions(kind=kind))
        assert any(said in note for note in exported.notes), exported.notes


def test_a_model_of_bitsandbytes_is_expanded(byte_level: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "plain", seeded(MODELS["qwen2"]), byte_level)
    model, tokenizer = slimtune.load(folder, quantize="nf4")
    written(tmp_path / "nf4", model, tokenizer)
    expected = slimtune.dequantize(model)
    export(str(tmp_path / "nf4"), "gguf", tmp_path / "gguf", ExportOptions(kind="F32"))
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32
    )
    for name, tensor in again.state_dict().items():
        assert_near(tensor, expected.state_dict()[name].float(), 1e-6)
