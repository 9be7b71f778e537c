"""What all tests share: quiet libraries, repeatable draws, and the real model once a session."""

from __future__ import annotations

import functools
import gc
import os
from collections import Counter
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
import typer.testing
from hypothesis import HealthCheck, settings

from slimtune.models.load import load

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it gives
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# Most of the time of a small command would go into reading the options of all commands anew.
typer.testing._get_command = functools.cache(typer.testing._get_command)  # pyright: ignore[reportPrivateImportUsage]

if not torch.accelerator.is_available():
    # `torch.manual_seed` formats the stack once for each kind of device that is not there: 0.8 ms, 100,000 times.
    torch.manual_seed = torch.default_generator.manual_seed


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `one_in(n)` each n-th case runs always; the others are `slow`."""
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("one_in")
        if mark is not None:
            grid = item.nodeid.partition("[")[0]
            if seen[grid] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[grid] += 1


def pytest_collection_finish() -> None:
    """Libraries and collected tests stay to the end: a collection of garbage need not look at them (0.5 s each)."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture
def short_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same measurements on smaller products: some processors take minutes for large ones in 16 bits."""
    for name, value in {"ROWS": 64, "WIDTH": 512, "STEP_BATCH": (1, 32), "SECONDS_EACH": 0.05}.items():
        monkeypatch.setattr(f"slimtune.plan.time.{name}", value)


@pytest.fixture(scope="session")
def smollm2_and_tokenizer() -> tuple[Any, Any]:
    return load("smollm2-135m-instruct", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def smollm2(smollm2_and_tokenizer: tuple[Any, Any]) -> Any:
    """SmolLM2-135M-Instruct in float32; copy it before changing it."""
    return smollm2_and_tokenizer[0].eval()


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_and_tokenizer: tuple[Any, Any]) -> Any:
    return smollm2_and_tokenizer[1]
