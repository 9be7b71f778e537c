"""llama.cpp as it is: a file is loaded by its server, which is asked what a model of transformers is asked."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xllamacpp


class LlamaCpp:
    """A GGUF file in llama.cpp, on one thread, in the numbers that it holds."""

    def __init__(self, path: Path, lora: Path | None = None, embeds: bool = False) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup = params.fit_params = False
        params.verbosity = -1
        # The cache in float32, so that what differs is the file and not how attention is stored.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if embeds:
            params.embedding = True
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        self.server = xllamacpp.Server(params)

    def greedy(self, prompt: str | Sequence[int], tokens: int) -> list[int]:
        """The likeliest tokens, one after the other."""
        request = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "n_predict": tokens,
            "temperature": 0,
            "return_tokens": True,
            "cache_prompt": False,
            "ignore_eos": True,
        }
        return self._ask("completion", request)["tokens"]

    def chat(self, messages: Sequence[dict[str, str]], tokens: int) -> str:
        """The likeliest answer to a conversation, through the chat template that the file holds."""
        request = {"messages": list(messages), "max_tokens": tokens, "temperature": 0, "cache_prompt": False}
        return self._ask("v1/chat/completions", request)["choices"][0]["message"]["content"]

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, with special tokens where it has some and around it."""
        return self._ask("tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def embedding(self, text: str) -> torch.Tensor:
        """The mean of the last hidden states, of norm 1."""
        return torch.tensor(self._ask("v1/embeddings", {"input": text})["data"][0]["embedding"])

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        # By HTTP, because the functions of the package leave out tokens that are parts of a letter.
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.server.listening_address}/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], tokens: int, ends: Sequence[int] = (0, 2)) -> list[int]:
    """What transformers writes; an answer goes on where it would end, as llama.cpp's does here."""
    ids = list(prompt)
    for _ in range(tokens):
        logits = model(torch.tensor([ids])).logits[0, -1]
        logits[list(ends)] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]
