"""An encoder behind `/v1/embeddings`."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import openai
import pytest
import torch

from slimtune.errors import ConfigError
from slimtune.models.load import load_model
from slimtune.serve.encoder import EncoderBackend, _stored_pooling
from slimtune.serve.gateway import Gateway, GatewaySettings
from slimtune.serve.registry import Registry
from slimtune.serve.tenants import Keyring
from slimtune.storage.source import folder_of
from small_server import Started, listening

TEXTS = ["two large lattes", "a slice of cake", "two large lattes, please"]


@pytest.fixture(scope="module")
def encoder() -> EncoderBackend:
    model, tokenizer = load_model("minilm-l6-v2", "features")
    return EncoderBackend(model, tokenizer, Path(folder_of("minilm-l6-v2")))


@pytest.fixture(scope="module")
def server(encoder: EncoderBackend) -> Iterator[Started]:
    gateway = Gateway(encoder, Registry(encoder), Keyring(None), GatewaySettings())
    with listening(gateway) as url:
        yield Started(gateway, url)


def test_vectors_are_those_of_the_model(server: Started, encoder: EncoderBackend) -> None:
    answer = server.client().embeddings.create(model="base", input=TEXTS, encoding_format="float")
    vectors = torch.tensor([entry.embedding for entry in answer.data])
    tokenizer, model = encoder.tokenizer, encoder.model
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    expected = torch.nn.functional.normalize(mean, dim=-1)
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)
    assert answer.usage.prompt_tokens == int(batch["attention_mask"].sum())
    assert vectors[0] @ vectors[2] > vectors[0] @ vectors[1]


def test_both_encodings_of_numbers(server: Started) -> None:
    plain = server.post("/v1/embeddings", {"model": "base", "input": "x"}).json()["data"][0]["embedding"]
    packed = server.post("/v1/embeddings", {"model": "base", "input": ["x"], "encoding_format": "base64"}).json()
    numbers = numpy.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), dtype="<f4")
    assert numpy.allclose(numbers, plain)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": "word " * 1000}, "1,002 tokens"),
        ({}, "input"),
        ({"input": [[5, 6]]}, "token ids"),
        ({"input": [5, 6]}, "check_embedding_ctx_length"),
    ],
)
def test_mistakes(server: Started, body: dict[str, Any], said: str) -> None:
    answer = server.post("/v1/embeddings", {"model": "base", **body})
    assert answer.status_code == 400
    assert said in json.dumps(answer.json()).lower()


def test_an_encoder_writes_no_text(server: Started) -> None:
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        server.client().completions.create(model="base", prompt="x")


@pytest.mark.parametrize(
    ("file", "text"),
    [("modules.json", "{"), ("modules.json", "{}"), ("1_Pooling/config.json", "[]"), ("1_Pooling", None)],
)
def test_a_damaged_folder_is_told_in_one_sentence(tmp_path: Path, file: str, text: str | None) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    if text is None:
        (path / "config.json").mkdir(parents=True)
    else:
        path.write_text(text)
    with pytest.raises(ConfigError, match="restore it"):
        _stored_pooling(tmp_path)
