"""GGUF files in llama.cpp and in transformers' own reader: the same answers as the models that they came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

from export.architectures import (
    CHARSMAP,
    MODELS,
    bert,
    byte_level_tokenizer,
    seeded,
    sentencepiece_tokenizer,
    unigram_tokenizer,
    word_piece_tokenizer,
)
from export.llama_cpp import LlamaCpp, greedy
from slimtune.errors import ConfigError
from slimtune.export.gguf.architectures import architecture_of
from slimtune.export.gguf.quantize import q4_0_blocks, q8_0_blocks
from slimtune.export.gguf.writer import read_tensors, tensors_of, write_model
from tensors import assert_near

PROMPTS = ([5, 6, 7, 300, 44, 90, 91, 92, 93, 94, 95], [10, 20, 30])


def written(path: Path, model: Any, tokenizer: Any, kind: str = "F32") -> list[str]:
    return write_model(path, architecture_of(model), model.config, tensors_of(model), tokenizer, kind)


@pytest.fixture(scope="module")
def byte_level() -> Any:
    return byte_level_tokenizer()


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_answers_token_by_token(name: str, byte_level: Any, tmp_path: Path) -> None:
    model = seeded(MODELS[name])
    written(tmp_path / "model.gguf", model, byte_level)
    engine = LlamaCpp(tmp_path / "model.gguf")
    for prompt in PROMPTS:
        assert engine.greedy(prompt, 12) == greedy(model, prompt, 12)


READ_BY_TRANSFORMERS = ["llama3", "mistral", "qwen2", "phi3"]
"""Those whose settings its reader takes from the file; for others it has the sizes of one model alone."""


@torch.no_grad()
@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_model(name: str, byte_level: Any, tmp_path: Path) -> None:
    model = seeded(MODELS[name])
    written(tmp_path / "model.gguf", model, byte_level)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    ids = torch.tensor([PROMPTS[0]])
    expected = dict(model.state_dict())
    for own, tensor in again.state_dict().items():
        assert_near(tensor, expected[own], 1e-6)
    if name in ("qwen2", "phi3"):  # the reader knows no slowed rotations, and no size of heads
        assert_near(again(ids).logits, model(ids).logits, 1e-4)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_smaller_types_are_as_near_as_their_numbers_are(kind: str, byte_level: Any, tmp_path: Path) -> None:
    model = seeded(MODELS["qwen2"])
    written(tmp_path / "model.gguf", model, byte_level, kind)
    tensors = tensors_of(model)
    bound = {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 254 + 2**-10, "Q4_0": 1 / 8}[kind]
    read = dict(read_tensors(tmp_path / "model.gguf", architecture_of(model), model.config, list(tensors)))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        error = (read[name] - tensor).abs().max() / tensor.abs().max()
        assert error <= (0 if tensor.ndim == 1 else bound), name
    assert len(LlamaCpp(tmp_path / "model.gguf").greedy(PROMPTS[0], 4)) == 4


@torch.no_grad()
def test_codes_of_another_quantizer_go_into_the_file_as_they_are(byte_level: Any, tmp_path: Path) -> None:
    model = seeded(MODELS["llama"])
    tensors: dict[str, Any] = tensors_of(model)
    generator = torch.Generator().manual_seed(0)
    for part, make, least, most in (
        ("self_attn.q_proj", q4_0_blocks, -8, 8),
        ("mlp.down_proj", q8_0_blocks, -127, 128),
    ):
        name = f"model.layers.0.{part}.weight"
        weight = tensors[name]
        codes = torch.randint(least, most, weight.shape, generator=generator)
        scales = (torch.rand(len(weight), weight.shape[1] // 32, generator=generator) * 0.2 / most).half().float()
        weight.copy_(codes * scales.repeat_interleave(32, dim=1))
        tensors[name] = make(codes, scales)
    write_model(tmp_path / "model.gguf", architecture_of(model), model.config, tensors, byte_level, "F32")
    read = read_tensors(tmp_path / "model.gguf", architecture_of(model), model.config, list(tensors))
    for name, tensor in read:
        assert_near(tensor, model.state_dict()[name], 1e-6)
    assert LlamaCpp(tmp_path / "model.gguf").greedy(PROMPTS[1], 8) == greedy(model, PROMPTS[1], 8)


def test_codes_beyond_their_bits_and_odd_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"codes must be in \[-8, 7\], found 9 to 9"):
        q4_0_blocks(torch.full((2, 64), 9), torch.ones(2, 2))
    with pytest.raises(ConfigError, match="one scale for each 32"):
        q8_0_blocks(torch.zeros(2, 64), torch.ones(2, 1))


TEXTS = ["Two large lattes for Maria, please.", "a  b\n\n1234 £5 — naïve 猫", "<s>x</s> don't"]


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_a_text_has_the_same_tokens(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    written(tmp_path / "model.gguf", seeded(MODELS["mistral"]), tokenizer)
    engine = LlamaCpp(tmp_path / "model.gguf")
    for text in TEXTS:
        assert engine.tokenize(text) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("charsmap", [b"", CHARSMAP])
def test_a_unigram_tokenizer_cuts_alike(charsmap: bytes, tmp_path: Path) -> None:
    tokenizer = unigram_tokenizer(charsmap)
    written(tmp_path / "model.gguf", seeded(MODELS["qwen2"]), tokenizer)
    engine = LlamaCpp(tmp_path / "model.gguf")
    for text in (*TEXTS, "  two\tcaf\u00e9s  ", "</s>Latte and</s> tea"):
        assert engine.tokenize(text) == tokenizer(text)["input_ids"]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    with pytest.raises(ConfigError, match=r"no way to treat spaces by.*first.*--converter"):
        written(tmp_path / "other.gguf", seeded(MODELS["qwen2"]), tokenizer)


@torch.no_grad()
def test_bert_embeds_alike(tmp_path: Path) -> None:
    model, tokenizer = bert(), word_piece_tokenizer()
    written(tmp_path / "model.gguf", model, tokenizer)
    engine = LlamaCpp(tmp_path / "model.gguf", embeds=True)
    for text in TEXTS[:2]:
        assert engine.tokenize(text) == tokenizer(text)["input_ids"]
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert_near(engine.embedding(text), states / states.norm(), 2e-3)
