"""A busy engine: requests arrive and are cancelled, adapters come and go, and each answer is still the one alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import slimtune
from slimtune.engine.engine import Engine
from slimtune.engine.request import Request, SamplingParams, TokenEvent
from slimtune.errors import AdapterNotFoundError
from small_text_model import tiny_model, tiny_tokenizer
from tensors import randomize

CONFIGS: dict[str, Any] = {
    "lora": slimtune.LoraConfig(r=4),
    "dora": slimtune.LoraConfig(r=2, use_dora=True),
    "ia3": slimtune.IA3Config(),
    "prefix": slimtune.PrefixTuningConfig(num_virtual_tokens=5),
    "prompt": slimtune.PromptTuningConfig(num_virtual_tokens=3),
    "full": slimtune.FullConfig(target_modules=["up_proj"]),
    "norms": slimtune.LNTuningConfig(),
}
STAYING = ("lora", "dora", "prefix", "norms", None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = randomize(slimtune, slimtune.get_peft_model(tiny_model(), config), seed=seed)
        made[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(made[name])
    return made


def drawn_request(draw: random.Random, names: Sequence[str | None]) -> Request:
    # Prompts begin alike often enough that slots are reused.
    prompt = (*range(5, 5 + draw.choice([0, 10, 30])), *(draw.randrange(3, 500) for _ in range(draw.randrange(1, 20))))
    sampling = SamplingParams(
        max_tokens=draw.randrange(1, 14), temperature=draw.choice([0.0, 0.0, 0.9]), seed=draw.randrange(9)
    )
    return Request(prompt, sampling, draw.choice(list(names)), draw.choice(["a", "b"]))


class Watched:
    def __init__(self) -> None:
        self.events: list[TokenEvent] = []
        self.done = threading.Event()

    def __call__(self, events: Sequence[TokenEvent]) -> None:
        assert not self.done.is_set()
        self.events += events
        if events[-1].finish_reason:
            self.done.set()


def live_through(folders: dict[str, Path], count: int, seed: int) -> None:
    """So many requests on one engine, held against a fresh engine that answers one at a time."""
    draw = random.Random(seed)
    engine = Engine(tiny_model(), tiny_tokenizer(), slots=4, context=96, prefill_chunk=9, rank_budget=4)
    for name in STAYING:
        if name is not None:
            engine.load_adapter(name, folders[name])
    engine.start()
    asked: list[tuple[Request, Watched, bool]] = []
    for number in range(count):
        if number % 10 == 5:
            name = draw.choice(["ia3", "prompt", "full"])
            if name in engine.adapters:
                engine.unload_adapter(name, wait=draw.random() < 0.5)
            else:
                engine.load_adapter(name, folders[name])
        request, watched = drawn_request(draw, [*CONFIGS, None]), Watched()
        try:
            handle = engine.submit(request, watched)
        except AdapterNotFoundError:
            assert request.adapter in ("ia3", "prompt", "full")
            continue
        is_cancelled = draw.random() < 0.2
        if is_cancelled:
            handle.cancel()
        asked.append((request, watched, is_cancelled))
    for _, watched, _ in asked:
        assert watched.done.wait(60)
    engine.stop()
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.free_slots) == (0, 0, 4)
    alone = Engine(tiny_model(), tiny_tokenizer(), slots=1, context=96)
    for name, folder in folders.items():
        alone.load_adapter(name, folder)
    for request, watched, is_cancelled in asked:
        last = watched.events[-1]
        if last.finish_reason == "error":
            assert "was unloaded" in str(last.error)
        elif last.finish_reason == "cancelled":
            assert is_cancelled
        else:
            (completion,) = alone.generate([request])
            found = tuple(event.token for event in watched.events), last.finish_reason
            assert found == (completion.tokens, completion.finish_reason), request


def test_a_busy_engine_gives_each_answer_as_alone(folders: dict[str, Path]) -> None:
    live_through(folders, count=60, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 6))
def test_a_long_busy_engine_gives_each_answer_as_alone(folders: dict[str, Path], seed: int) -> None:
    live_through(folders, count=2000, seed=seed)
