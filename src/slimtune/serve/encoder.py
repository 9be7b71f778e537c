"""An encoder as a backend: texts to vectors, pooled as its folder says for sentence-transformers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch.nn.functional import normalize

from slimtune.data.features import extract
from slimtune.data.texts import longest_input
from slimtune.engine.request import LoadedAdapter
from slimtune.errors import ConfigError
from slimtune.ops.worker_threads import release_worker_threads
from slimtune.serve.backend import GenerationRequest, Piece
from slimtune.serve.openai import bad_request
from slimtune.serve.queue import Turns
from slimtune.storage.text_files import read_json

_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}
_BATCH = 32


class EncoderBackend:
    """Vectors of an encoder.

    Args:
        folder: the model's, which may say how its vectors are pooled and whether they are normalised.
    """

    slots: int = 1
    takes_turns = True
    context: int

    def __init__(self, model: Any, tokenizer: Any, folder: Path) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.context = longest_input(model, tokenizer, None)
        self.pooling, self.is_normalised = _stored_pooling(folder)
        # One thread: torch uses all cores in it, and the event loop goes on answering.
        self._working = ThreadPoolExecutor(1, "slimtune-embed")

    async def start(self) -> None:
        """Hand the products over to the thread that embeds, from this one, which has loaded the model."""
        release_worker_threads()

    async def stop(self) -> None:
        """Let the thread go."""
        self._working.shutdown(wait=False, cancel_futures=True)

    async def is_ready(self) -> bool:
        """It always is."""
        return True

    def stats(self) -> None:
        """It has no steps to tell of."""

    async def embed(self, texts: list[str]) -> tuple[list[list[float]], int]:
        """A vector for each text, and how many tokens they have."""
        return await asyncio.get_running_loop().run_in_executor(self._working, self._embed, texts)

    def _embed(self, texts: list[str]) -> tuple[list[list[float]], int]:
        # Counted here and refused: OpenAI's API cuts nothing off, and neither does this one.
        lengths = [len(ids) for ids in self.tokenizer(texts)["input_ids"]]
        if max(lengths) > self.context:
            message = f"a text has {max(lengths):,} tokens, and the model reads {self.context:,}; shorten it"
            raise bad_request(message, "input", "context_length_exceeded")
        vectors_ND = extract(self.model, self.tokenizer, texts, self.pooling, _BATCH, max_length=self.context)
        if self.is_normalised:
            vectors_ND = normalize(vectors_ND, dim=-1)
        return vectors_ND.tolist(), sum(lengths)

    async def answer(
        self, body: GenerationRequest, adapter: str | None, tenant: str, turns: Turns
    ) -> AsyncGenerator[Piece, None]:
        """Raises: ApiError."""
        raise bad_request("this base is an encoder and writes no text; ask /v1/embeddings", "model")
        yield Piece()

    async def load_adapter(self, name: str, folder: Path) -> LoadedAdapter:
        """Raises: ConfigError."""
        raise ConfigError("an encoder is served without adapters; merge one first with slimtune merge")

    async def unload_adapter(self, name: str) -> None:
        """There are none."""


def _stored_pooling(folder: Path) -> tuple[str, bool]:
    """How vectors are pooled, and whether they are normalised: by the mean and not, where the folder doesn't say.

    Raises:
        ConfigError: what it says can't be read, or is a pooling that isn't served.
    """
    modules = _stored(folder / "modules.json", list)
    is_normalised = any("Normalize" in str(module.get("type")) for module in modules if isinstance(module, dict))
    file = folder / "1_Pooling" / "config.json"
    pooling = _stored(file, dict)
    if not pooling:
        return "mean", is_normalised
    wanted = [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on is True]
    if len(wanted) != 1 or wanted[0] not in _POOLINGS:
        raise ConfigError(f"{file} pools by {', '.join(wanted) or 'nothing'}; only {', '.join(_POOLINGS)} is served")
    return _POOLINGS[wanted[0]], is_normalised


def _stored(file: Path, kind: type[Any]) -> Any:
    """The value of a file, empty where there is none. Raises: ConfigError, for another kind, or what can't be read."""
    try:
        value = read_json(file) if file.exists() else kind()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} can't be read as JSON: {error}; restore it") from error
    if not isinstance(value, kind):
        raise ConfigError(f"{file} is a {type(value).__name__}, not a {kind.__name__}; restore it")
    return value
