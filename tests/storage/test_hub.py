"""What is fetched of a repository, and when a bar is shown for it: by a server of this machine."""

from __future__ import annotations

import itertools
import json
import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from small_hub import serving

FILES = {
    "always": {"config.json", "tokenizer.json", "chat_template.jinja", "README.md", "adapter_model.safetensors"},
    "weights": {"model.safetensors"},
    "code": {"modeling_own.py"},
    "never": {"pytorch_model.bin", "original/consolidated.pth", "model.onnx", "model-Q4_K_M.gguf"},
}
CHOICES = list(itertools.product((False, True), repeat=2))
"""Of weights and code."""
SCRIPT = """
import json, os, sys
from slimtune.storage.hub import fetched

taken = []
for weights, code in json.loads(sys.argv[1]):
    folder = fetched(f"people/repository@{int(weights)}{int(code)}", weights, code)
    files = [os.path.relpath(os.path.join(at, name), folder) for at, _, names in os.walk(folder) for name in names]
    taken.append(files)
print(json.dumps(taken))
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The same repository at a revision for each choice, so that none is in the cache because of another."""
    for weights, code in CHOICES:
        for name in set().union(*FILES.values()):
            path = tmp_path / f"hub/models/people/repository/{int(weights)}{int(code)}/{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
    return tmp_path / "hub"


def fetch(repository: Path, choices: Sequence[tuple[bool, ...]], cache: Path, stderr: int) -> list[set[str]]:
    # A process of its own: the Hub's address is read once.
    with serving(repository) as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", SCRIPT, json.dumps(choices)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, check=True)
    return [set(files) for files in json.loads(done.stdout)]


def test_weights_and_code_are_fetched_where_they_are_needed_and_copies_never(repository: Path, tmp_path: Path) -> None:
    for (weights, code), files in zip(
        CHOICES, fetch(repository, CHOICES, tmp_path / "cache", subprocess.PIPE), strict=True
    ):
        assert files == FILES["always"] | (FILES["weights"] if weights else set()) | (FILES["code"] if code else set())


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_bar_is_shown_for_weights_on_a_terminal(
    weights: bool, is_terminal: bool, repository: Path, tmp_path: Path
) -> None:
    reader, writer = pty.openpty() if is_terminal else os.pipe()
    fetch(repository, [(weights, False)], tmp_path / "cache", writer)
    os.write(writer, b"|")
    os.close(writer)
    shown = os.read(reader, 10_000).decode().partition("|")[0]
    os.close(reader)
    assert bool(shown) is (weights and is_terminal), shown
