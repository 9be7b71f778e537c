"""Two gloo processes, DDP and FSDP2: the losses and the adapter of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import slimtune
from tensors import assert_all_near, assert_near, assert_same, predict
from zoo import LLAMA

SCRIPT = Path(__file__).with_name("distributed_training.py")


def run(mode: str, processes: int, output: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean loss of each step, and the adapter at the end."""
    output.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = command if processes > 1 else [sys.executable]
    tests = str(SCRIPT.parent.parent)
    environment = {**os.environ, "PYTHONPATH": tests, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(SCRIPT), mode, str(output)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    losses = torch.tensor(json.loads((output / "losses.json").read_text()))
    return losses, torch.load(output / "tensors.pt")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return run("single", 1, tmp_path_factory.mktemp("one") / "single")


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "accelerate"])
def test_two_processes_are_one(mode: str, one_process: tuple, tmp_path: Path) -> None:
    losses, tensors = run(mode, 2, tmp_path / mode)
    assert_near(losses, one_process[0], 1e-5)
    assert_all_near(tensors, one_process[1], 1e-5)
    assert_same(load_file(tmp_path / mode / "adapter" / "adapter_model.safetensors"), tensors)
    reread = slimtune.PeftModel.from_pretrained(LLAMA.model(), tmp_path / mode / "adapter")
    assert not torch.equal(predict(reread, LLAMA.batch()), predict(LLAMA.model(), LLAMA.batch()))


def test_a_bf16_base_is_sharded_beside_float32_adapters(tmp_path: Path) -> None:
    alone, _ = run("single-bf16", 1, tmp_path / "alone")
    losses, tensors = run("fsdp-bf16", 2, tmp_path / "sharded")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert_near(losses, alone, 2.0**-8)
