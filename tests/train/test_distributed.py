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
from tensors import adapter_tensors, assert_all_near, assert_near, assert_same, predict
from train.distributed_training import eva_batches, waiting_for_eva
from zoo import LLAMA

SCRIPT = Path(__file__).with_name("distributed_training.py")
MODES = ["single", "ddp", "fsdp", "accelerate", "single-bf16", "fsdp-bf16"]


Outcome = tuple[torch.Tensor, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What came of each mode; one pair of processes runs them all."""
    output = tmp_path_factory.mktemp("distributed")
    paths = (str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(SCRIPT), str(output), *MODES, "eva", "evaluation"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        },
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return output


def outcome(folder: Path, mode: str) -> Outcome:
    """The mean loss of each step, and the adapter at the end."""
    losses = torch.tensor(json.loads((folder / mode / "losses.json").read_text()))
    return losses, torch.load(folder / mode / "tensors.pt")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("mode", ["ddp", "fsdp", "accelerate"])
def test_two_processes_are_one(mode: str, folder: Path) -> None:
    losses, tensors = outcome(folder, mode)
    expected_losses, expected = outcome(folder, "single")
    assert len(set(expected_losses.tolist())) > 1
    assert_near(losses, expected_losses, 1e-5)
    assert_all_near(tensors, expected, 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_adapter_is_saved_whole(mode: str, folder: Path) -> None:
    _, tensors = outcome(folder, mode)
    assert_same(load_file(folder / mode / "adapter" / "adapter_model.safetensors"), tensors)
    reread = slimtune.PeftModel.from_pretrained(LLAMA.model(), folder / mode / "adapter")
    assert not torch.equal(predict(reread, LLAMA.batch()), predict(LLAMA.model(), LLAMA.batch()))


def test_a_bf16_base_is_sharded_beside_float32_adapters(folder: Path) -> None:
    losses, tensors = outcome(folder, "fsdp-bf16")
    expected_losses, _ = outcome(folder, "single-bf16")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert_near(losses, expected_losses, 2.0**-8)


def test_all_processes_start_from_what_the_first_one_reads(folder: Path) -> None:
    model = waiting_for_eva()
    slimtune.initialize_lora_eva_weights(model, eva_batches(rank=0))
    expected = adapter_tensors(slimtune, model)
    first, second = (torch.load(folder / "eva" / f"tensors-{rank}.pt") for rank in (0, 1))
    directions = {name: tensor for name, tensor in expected.items() if "lora_A" in name}
    assert len(directions) > 1
    assert_same({name: first[name] for name in directions}, directions)
    assert_same(first, second)


@pytest.mark.parametrize(("mistake", "said"), [("empty", "EVA found no batch"), ("sharded", "it is sharded")])
def test_each_process_is_told_why_eva_cannot_start(mistake: str, said: str, folder: Path) -> None:
    for rank in (0, 1):
        assert said in (folder / "eva" / f"{mistake}-{rank}.txt").read_text()


def test_two_processes_count_each_held_out_example_once(folder: Path) -> None:
    found, expected = json.loads((folder / "evaluation" / "losses.json").read_text())
    assert found == pytest.approx(expected, rel=1e-5)
