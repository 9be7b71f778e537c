"""A tiny base, data and a trained adapter, and the command line to run on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from slimtune.cli import app
from small_text_model import orders, save_base, write_lines

Run = Callable[..., Result]


def invoke(*arguments: Any, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture
def run() -> Run:
    """Runs `slimtune` with these arguments in this process."""
    return invoke


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_lines(folder / "train.jsonl", *({"messages": e.messages()} for e in orders(24)))


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Path:
    """An adapter that learned enough to answer differently from its base."""
    output = tmp_path_factory.mktemp("adapters") / "tuned"
    options = ["--max-steps", 30, "--learning-rate", 0.03, "--rank", 4, "--batch-size", 8]
    result = invoke("train", base, data, "--output", output, *options)
    assert result.exit_code == 0, result.output
    return output
